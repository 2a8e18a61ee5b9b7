"""The list of GPU checks, in the order they run. `doctor --gpu` and `pytest -m gpu` both take it.

No torch here: the command line names the checks before anything heavy is imported.
"""

from dataclasses import dataclass

from spectral_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check, which runs in a process of its own."""

    name: str
    """What `--only` takes."""
    title: str
    """What must hold, for the page."""
    module: str
    """Module of `gpu_checks` that holds it."""
    function: str
    """Name of the function in that module; called with a `Place`, it returns a `CheckFinding`."""
    gpus: int = 1
    """GPUs that it needs."""
    gigabytes: float = 4.0
    """Memory of each GPU that it needs."""


CHECKS: tuple[Check, ...] = (
    Check(
        name="layers",
        title="SST layers give the numbers of a dense product in double precision on the CPU",
        module="numerics",
        function="check_layers",
    ),
    Check(
        name="tf32",
        title="TF32, forced on, reaches neither the bank nor a rebuilt weight",
        module="numerics",
        function="check_tf32",
    ),
    Check(
        name="synchronisations",
        title="an ordinary step waits for the device at most once",
        module="hot_path",
        function="check_synchronisations",
    ),
    Check(
        name="determinism",
        title="deterministic runs repeat, and resume, bit for bit",
        module="training",
        function="check_determinism",
    ),
    Check(
        name="backends",
        title="every backend on one GPU has the losses of one CPU process",
        module="equivalence",
        function="check_backends",
    ),
    Check(
        name="backends-on-two-gpus",
        title="every backend on several GPUs has the losses of one CPU process",
        module="equivalence",
        function="check_backends_on_several_gpus",
        gpus=2,
    ),
    Check(
        name="swap",
        title="a bank on the host draws the triplets of one on the GPU, within the plan's memory",
        module="training",
        function="check_swap",
    ),
    Check(
        name="compile",
        title="compiled blocks train the same losses, and a swap compiles nothing again",
        module="hot_path",
        function="check_compile",
    ),
    Check(
        name="out-of-memory",
        title="a rank without memory says so within a minute",
        module="failures",
        function="check_out_of_memory",
    ),
    Check(
        name="hang",
        title="a rank whose GPU never answers is named within a minute",
        module="failures",
        function="check_hang",
    ),
    Check(
        name="lost-rank",
        title="a rank that is killed or stopped is named by the others within a minute",
        module="failures",
        function="check_lost_rank",
        gpus=2,
    ),
    Check(
        name="async-save",
        title="a background save stalls training for under 5 % of its own time",
        module="hot_path",
        function="check_async_save",
        gigabytes=8.0,
    ),
    Check(
        name="start-peak",
        title="FSDP2 starts within the memory that the plan names",
        module="start",
        function="check_start_peak",
        gigabytes=20.0,
    ),
    Check(
        name="bench-125m",
        title="a whole step of OPT-125M, SST against dense",
        module="bench_tables",
        function="check_opt_125m",
        gigabytes=16.0,
    ),
    Check(
        name="svd",
        title="SVDs of 512 to 8192 are orthogonal and rebuild their matrix",
        module="svd_times",
        function="check_svd",
        gigabytes=10.0,
    ),
    Check(
        name="bench-1.3b",
        title="a whole step of OPT-1.3B, SST against dense",
        module="bench_tables",
        function="check_opt_1_3b",
        gigabytes=48.0,
    ),
)
"""Quick checks and those that find faults come first; what takes minutes comes last."""


def named(names: list[str]) -> list[Check]:
    """The checks of these names, in the list's order; all if none is named. Raises ConfigError."""
    known = [check.name for check in CHECKS]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"--only {' '.join(unknown)}: there is no such check; give one of {', '.join(known)}"
        )
    return [check for check in CHECKS if not names or check.name in names]
