"""The evaluations of one attempt at a run: what is logged of each, and the first and the last."""

import time
from typing import Any

from spectral_scale.engine.evaluate import Evaluation, evaluate
from spectral_scale.engine.run import Run
from spectral_scale.supervision.supervisor import Supervisor


class Evaluations:
    """Evaluates a run on its validation batches, if it has some.

    Args:
        run: the run that is trained.
        supervisor: is told that an evaluation begins.
    """

    def __init__(self, run: Run, supervisor: Supervisor) -> None:
        self._run, self._supervisor = run, supervisor
        self.first: Evaluation | None = None
        """The evaluation before the run's first step, if this attempt began there."""
        self.last: Evaluation | None = None
        """The latest evaluation of this attempt."""

    def measure(self, step: int, values: dict[str, Any]) -> None:
        """Evaluate after `step` steps; `values` receives what is logged of it. Collective."""
        run = self._run
        if run.validation is None:
            return
        self._supervisor.mark(step, "evaluation")
        started = time.perf_counter()
        self.last = evaluate(
            run.forward,
            run.validation,
            device=run.backend.device,
            collective=run.backend.data_collective,
            autocast=run.autocast,
        )
        if step == 0:
            self.first = self.last
        values["validation/loss"] = self.last.loss
        values["validation/perplexity"] = self.last.perplexity
        values["validation/seconds"] = time.perf_counter() - started
