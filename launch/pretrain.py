"""The same as `spectral-scale train`, for launchers that want a script."""

import sys

from spectral_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
