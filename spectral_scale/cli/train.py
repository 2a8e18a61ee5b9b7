"""`spectral-scale train`: start a run, or resume the one its folder holds."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_scale.cli.arguments import (
    add_launcher,
    add_run_config,
    launcher_flags,
    load_run_config,
)
from spectral_scale.cluster.adopt import adopt_launcher
from spectral_scale.cluster.detect import LauncherFlags
from spectral_scale.config.check import keys_without_effect
from spectral_scale.config.load import ResolvedConfig, build_parser, load_config
from spectral_scale.config.resolve import resolve
from spectral_scale.errors import SpectralScaleError

if TYPE_CHECKING:
    from spectral_scale.config.schema import RunConfig
    from spectral_scale.engine.build import Inputs
    from spectral_scale.engine.outcome import Outcome
    from spectral_scale.engine.run import Run
    from spectral_scale.supervision.exit_status import ExitStatus

logger = logging.getLogger(__name__)

RESUMABLE = 75

DESCRIPTION = """Train a model, or resume the run that its folder holds.

Any key of the configuration can be given as --section.key VALUE, for example
  spectral-scale train --config run.yaml --train.steps 2000 --optimizer.lr 5e-4
--print-config shows every key, its value and where the value came from."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a model, or resume a run",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `train` and `finetune` take."""
    add_run_config(parser)
    parser.add_argument("--print-config", action="store_true", help="print the settings and exit")
    parser.add_argument("--help-config", action="store_true", help="describe every key and exit")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the result")
    add_launcher(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train. Returns 0 when the run is complete, 75 when it stopped early and can be resumed."""
    if arguments.help_config:
        print(build_parser().format_help())
        return 0
    resolved = load_run_config(arguments)
    if arguments.print_config:
        print(resolved.to_yaml(with_sources=True), end="")
        return 0
    return train(resolved, output=arguments.format, flags=launcher_flags(arguments))


def train(loaded: ResolvedConfig, *, output: str, flags: LauncherFlags) -> int:
    """Check, build, train and report. Every rank runs this; rank 0 speaks.

    A configuration that cannot run is refused before anything is written.
    """
    placement = adopt_launcher(flags)
    rank_info = placement.rank_info
    resolved = resolve(loaded.config, world_size=rank_info.world_size)

    from spectral_scale.engine.build import check_inputs
    from spectral_scale.supervision.exit_status import ExitStatus
    from spectral_scale.supervision.run_folder import create_run_folder, log_to_file

    inputs = check_inputs(resolved, rank_info)
    config = inputs.run.config
    run_dir = Path(config.train.run_dir)
    create_run_folder(run_dir)
    handler = log_to_file(run_dir, rank_info.rank)
    logger.info(placement.note)
    if placement.warning is not None:
        logger.warning(placement.warning)
        _say(f"warning: {placement.warning}")
    exit_status = ExitStatus(
        run_dir,
        rank=rank_info.rank,
        steps=config.train.steps,
        max_starts=config.train.max_starts_without_progress,
    )
    try:
        with _alone(run_dir, rank_info.rank):
            try:
                exit_status.begin()
                return _train(inputs, run_dir, output, exit_status)
            except BaseException as error:
                replaced = exit_status.failed(error)
                if replaced is not error:
                    raise replaced from error
                raise
    finally:
        logging.getLogger("spectral_scale").removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _alone(run_dir: Path, rank: int) -> Iterator[None]:
    """Hold the run folder's lock on rank 0, so that two jobs never write the same run."""
    from spectral_scale.checkpoint.lock import RunLock

    with RunLock(run_dir) if rank == 0 else contextlib.nullcontext():
        yield


def _train(inputs: "Inputs", run_dir: Path, output: str, exit_status: "ExitStatus") -> int:
    from spectral_scale.engine.build import build_run

    built = build_run(inputs)
    try:
        code = _loop(built, run_dir, output, exit_status)
    except BaseException:
        built.backend.close(failed=True)
        raise
    built.backend.close()
    return code


def _loop(built: "Run", run_dir: Path, output: str, exit_status: "ExitStatus") -> int:
    from spectral_scale.engine.loop import TrainingLoop
    from spectral_scale.metrics.sinks import MetricsLog, NullLog
    from spectral_scale.supervision.run_folder import write_config
    from spectral_scale.supervision.status import write_status

    config = built.config
    speaks, steps = built.backend.collective.rank == 0, config.train.steps
    if built.start_step >= steps:
        if speaks:
            write_status(run_dir, "completed", step=built.start_step, steps=steps)
            _say_done(run_dir, built.start_step, output)
        return 0
    log: MetricsLog | NullLog = NullLog()
    progress = None
    if speaks:
        from spectral_scale.cli.progress import make_progress

        _warn_of_learning_rates(built, run_dir)
        write_config(run_dir, built.config)
        _introduce(built)
        write_status(run_dir, "running", step=built.start_step, steps=steps)
        log = MetricsLog(
            run_dir,
            tensorboard=config.metrics.tensorboard,
            resume_step=built.start_step or None,
        )
        progress = make_progress(
            start_step=built.start_step, steps=steps, bar=config.metrics.progress
        )
    loop = TrainingLoop(built, log, progress, end=exit_status.at_once)
    loop.supervisor.require_time_to_save()
    outcome = loop.train()
    log.close()
    if progress is not None:
        progress.close()
        _conclude(run_dir, outcome, config, output)
    return 0 if outcome.stopped is None else RESUMABLE


def _warn_of_learning_rates(built: "Run", run_dir: Path) -> None:
    """Say if this start continues a run at other learning rates than it had."""
    from spectral_scale.engine.identity import learning_rate_jump

    if not built.start_step:
        return
    try:
        before = load_config([run_dir / "config.yaml"]).config
    except SpectralScaleError:  # it is written anew now
        return
    applied = built.start_step - built.skipped_steps
    jump = learning_rate_jump(before, built.config, applied_steps=applied)
    if jump is not None:
        logger.warning(jump)
        _say(f"warning: {jump}")


def _introduce(built: "Run") -> None:
    from spectral_scale.engine.measure import parameter_counts
    from spectral_scale.supervision.run_folder import write_environment

    config, counts = built.config, parameter_counts(built)
    trained, dense = counts["parameters_trained"], counts["parameters_dense"]
    name = config.model.name if config.model.path is None else config.model.path
    world_size = built.backend.collective.world_size
    write_environment(
        Path(config.train.run_dir),
        counts
        | {
            "device": str(built.backend.device),
            "world_size": world_size,
            "data_fingerprint": built.loader.folder.fingerprint,
        },
    )
    _say(
        f"{name}: {dense / 1e6:.1f} M weights, {trained / 1e6:.1f} M of them train at a time "
        f"({100 * trained / dense:.1f} %), on {world_size} x {built.backend.device}"
    )
    if built.controller is not None:
        _say(built.controller.describe())
    if built.gradient_filter is not None:
        _say(built.gradient_filter.describe())
    unused = keys_without_effect(config)
    for choice, in_filter in (("spectral.method", False), ("filter.kind", True)):
        keys = [key for key in unused if key.startswith("filter.") == in_filter]
        if keys:
            value = config.filter.kind if in_filter else config.spectral.method
            _say(f"without effect for {choice}={value}: {', '.join(keys)}")
    if built.start_step:
        _say(f"resuming at step {built.start_step} of {config.train.steps}")


def _conclude(run_dir: Path, outcome: "Outcome", config: "RunConfig", output: str) -> None:
    from spectral_scale.supervision.status import write_status

    steps = config.train.steps
    if outcome.stopped is not None:
        write_status(
            run_dir,
            "stopped",
            step=outcome.step,
            steps=steps,
            reason=f"stopped by {outcome.stopped}",
            requeue=outcome.requeue,
        )
        what = f"stopped at step {outcome.step} of {steps} and saved"
        if not outcome.saved:
            what = f"stopped without saving; step {outcome.step} of {steps} is the last saved"
        _say(f"\n{what}; run the same command again to continue")
        return
    write_status(run_dir, "completed", step=outcome.step, steps=steps)
    if config.metrics.report:
        _write_report(run_dir)
    _say_done(run_dir, outcome.step, output)


def _write_report(run_dir: Path) -> None:
    from spectral_scale.metrics.report.page import write_report

    try:
        write_report([run_dir], run_dir / "report.html")
    except Exception as error:  # the run itself is complete and saved: its outcome stands
        logger.debug("report.html", exc_info=True)
        _say(f"warning: report.html could not be written ({type(error).__name__}: {error})")


def _say_done(run_dir: Path, step: int, output: str) -> None:
    points = _perplexities(run_dir)
    result: dict[str, Any] = {"run_dir": str(run_dir), "step": step, "state": "completed"}
    if points:
        result |= {"perplexity_before": points[0], "perplexity_after": points[-1]}
    if output == "json":
        print(json.dumps(result))
        return
    print(f"\nrun complete at step {step}")
    if points:
        print(f"validation perplexity: {points[0]:.1f} before, {points[-1]:.1f} after")
    if (run_dir / "report.html").is_file():
        print(f"report:      {run_dir / 'report.html'}")
    print(f"metrics:     {run_dir / 'metrics.jsonl'}")
    print(f"tensorboard: tensorboard --logdir {run_dir / 'tensorboard'}")
    print("next: train for longer with --train.steps, or start another run with --train.run_dir")


def _perplexities(run_dir: Path) -> list[float]:
    """Read the validation perplexities by step; none if metrics.jsonl cannot be read."""
    from spectral_scale.metrics.history import read_metrics

    key = "validation/perplexity"
    try:
        return [line[key] for line in read_metrics(run_dir) if key in line]
    except OSError as error:  # the run itself is complete and saved
        _say(f"metrics.jsonl cannot be read: {error}")
        return []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
