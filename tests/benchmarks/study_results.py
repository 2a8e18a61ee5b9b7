"""Made-up results to give the study."""

from study.plan import all_trials
from study.results import Result
from study.trial import Trial


def result_of(trial: Trial, loss: float = 5.0, *, diverged: bool = False) -> Result:
    """A made-up result of a trial whose settings are known."""
    every_step = trial.settings["metrics.log_interval"] == 1
    steps = range(1, trial.steps + 1)
    marks = range(0, trial.steps + 1, 500)
    return Result(
        name=trial.name,
        stage=trial.stage,
        settings=dict(trial.settings),
        diverged=diverged,
        validation=[] if diverged else [(step, loss) for step in sorted({*marks, trial.steps})],
        training=[(trial.steps, loss)],
        gradient_norms={"low_rank": [1.0 for _ in steps]} if every_step else {},
        facts={
            "train_seconds": trial.steps * 0.5,
            "parameters_trained": 1234567,
            "data_fingerprint": "books",
            "machine": {"cpu": "a processor", "cores": 2},
            "versions": {"torch": "2"},
            "commit": "abc",
        },
    )


def complete(loss_of=lambda trial: 5.0, *, until=lambda trial: False) -> dict[str, Result]:
    """Results of all runs in the order of the plan, up to the first that `until` names."""
    results: dict[str, Result] = {}
    while True:
        left = [t for t in all_trials(results) if t.name not in results and t.settings]
        if not left or until(left[0]):
            return results
        results[left[0].name] = result_of(left[0], loss_of(left[0]))
