"""Commands and tiny runs in this process, shared by the tests beside it."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_scale.cli.main import main
from spectral_scale.testing.tiny import TINY

STEPS = 10

OPT: dict[str, Any] = {}
POST_NORM = {"model.name": "opt-350m", "spectral.storage": "factored"}
BF16 = {"train.precision": "bf16"}
FP64 = {"train.precision": "fp64"}
LORA = {"spectral.method": "lora"}
FULL = {"spectral.method": "full"}
TANGENT = {"spectral.form": "tangent"}


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def command(*words: object) -> Ran:
    """Run `spectral-scale WORDS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Ran(code, out.getvalue(), err.getvalue())


def train(corpus: Path, run_dir: Path, **changes: Any) -> Ran:
    """Train a tiny model; changes are given as section__key=value."""
    values = TINY | {
        "data.train": corpus / "train",
        "data.validation": corpus / "valid",
        "train.run_dir": run_dir,
        "train.steps": STEPS,
        "train.eval_interval": STEPS,
        "checkpoint.interval": STEPS - 1,
        "spectral.iteration_warmup_steps": 1,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return command("train", *(f"--{key}={value}" for key, value in values.items()))
