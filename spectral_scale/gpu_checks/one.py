"""One check, in a process of its own: `python -m spectral_scale.gpu_checks.one NAME FOLDER RESULT`.

The result is written as JSON, in one piece; a process that dies before leaves none.
"""

import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from spectral_scale.gpu_checks.catalogue import Check, named
from spectral_scale.gpu_checks.findings import CheckFinding, Result, judged
from spectral_scale.gpu_checks.place import Place, facts, find_place, unmet
from spectral_scale.supervision.status import write_json

REHEARSAL = "--rehearsal"


def perform(check: Check, place: Place) -> Result:
    """Run a check here; what it raises is a failure, with the traceback as its text."""
    if reason := unmet(check, place):
        return Result(name=check.name, verdict="skip", reason=reason, facts=facts(place))
    started = time.perf_counter()
    try:
        function = getattr(import_module(f"spectral_scale.gpu_checks.{check.module}"),
                           check.function)  # fmt: skip
        finding: CheckFinding = function(place)
    except Exception as error:
        return Result(
            name=check.name,
            verdict="fail",
            reason=f"{type(error).__name__}: {error}".splitlines()[0],
            seconds=time.perf_counter() - started,
            text=f"```\n{traceback.format_exc().strip()}\n```",
            facts=facts(place),
        )
    seconds = time.perf_counter() - started
    return judged(check.name, finding, seconds=seconds, facts=facts(place))


def main(words: list[str]) -> None:
    """Run the check that the words name."""
    name, folder, result = words[:3]
    (check,) = named([name])
    place = find_place(Path(folder), rehearsal=REHEARSAL in words)
    write_json(Path(result), perform(check, place).to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
