"""Where a run returns to after steps in a row that could not be applied, and the error if nowhere.

A bad batch that is left out costs one step. Many in a row mean that the weights themselves have
gone bad, so that the run goes back to a checkpoint of before and passes over the data in between.
"""

from pathlib import Path

from spectral_scale.checkpoint.manager import CheckpointManager
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.data.loader import TrainLoader
from spectral_scale.engine.run import Run
from spectral_scale.errors import HealthError
from spectral_scale.supervision.incidents import INCIDENTS_NAME, step_data
from spectral_scale.supervision.supervisor import Supervisor


def way_back(
    run: Run, supervisor: Supervisor, bad: str, *, step: int, data_step: int
) -> CheckpointReader:
    """The checkpoint that a run returns to after steps that were left out. Collective.

    Args:
        run: the run that is trained.
        supervisor: knows how many steps in a row were left out, and how often the run went back.
        bad: which steps were left out, for the error.
        step: the last of them.
        data_step: the data step of its batch.

    Raises HealthError if there is no checkpoint, or if the run has gone back often enough.
    """
    reader = None
    if supervisor.may_roll_back:
        healthy = step - supervisor.skipped_in_a_row
        interval = run.config.checkpoint.interval
        reader = checkpoint_before(run.checkpoints, healthy, interval=interval)
    if reader is None:
        run_dir = Path(run.config.train.run_dir)
        raise no_way_back(supervisor, bad, loader=run.loader, data_step=data_step, run_dir=run_dir)
    return reader


def checkpoint_before(
    checkpoints: CheckpointManager, step: int, *, interval: int
) -> CheckpointReader | None:
    """The newest good checkpoint of at most `step`, one saved in turn if there is any. Collective.

    Where a run goes back to must not depend on when it was stopped, or asked to save.

    Args:
        checkpoints: the run's checkpoints.
        step: the last step before those that were left out.
        interval: checkpoints of multiples of it were saved in turn.
    """
    in_turn = checkpoints.latest_good(lambda s: s <= step and s % interval == 0)
    return in_turn or checkpoints.latest_good(lambda s: s <= step)


def no_way_back(
    supervisor: Supervisor, bad: str, *, loader: TrainLoader, data_step: int, run_dir: Path
) -> HealthError:
    """The error of a run that cannot return to a checkpoint, or has done so in vain.

    Args:
        supervisor: knows why the last step was left out, and how often the run went back.
        bad: which steps were left out.
        loader: where the last batch came from.
        data_step: the data step of that batch.
        run_dir: the run folder.
    """
    why = "there is no checkpoint to go back to"
    if not supervisor.may_roll_back:
        why = f"going back {supervisor.rollbacks} times did not help"
    return HealthError(
        f"{bad} ({supervisor.skip_reason}), and {why}; the last batch held samples "
        f"{step_data(loader, data_step)['samples']}; look at {run_dir / INCIDENTS_NAME}, lower the "
        "learning rates, and start again"
    )
