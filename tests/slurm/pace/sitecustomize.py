"""In jobs of these tests: training waits before a step for a file, so that something can happen.

After it a job's first start takes a second a step: what happened is to be noticed before the last.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

STEP, FILE = int(os.environ.get("HOLD_AFTER_STEP", "-1")), os.environ.get("HOLD_UNTIL_FILE", "")
MODULE = "spectral_scale.data.loader"


class Holder(importlib.abc.MetaPathFinder):
    """Finds the loader's module as usual, and wraps what it defines."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            steps = module.TrainLoader.steps

            def held(*arguments, **options):
                for batch in steps(*arguments, **options):
                    while batch.step == STEP and not os.path.exists(FILE):
                        time.sleep(0.05)
                    if batch.step > STEP and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
                        time.sleep(1.0)
                    yield batch

            module.TrainLoader.steps = held

        spec.loader.exec_module = exec_module
        return spec


if FILE:
    sys.meta_path.insert(0, Holder())
