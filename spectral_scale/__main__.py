"""`python -m spectral_scale` is the console command."""

import sys

from spectral_scale.cli.main import main

sys.exit(main())
