"""The signals by which terminals and schedulers ask a run to end. No torch here."""

import signal

STOP_SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # kill, launchers, SLURM at the time limit, container runtimes
    signal.SIGHUP,  # the terminal was closed; torchrun hands it to its ranks even under nohup
    signal.SIGUSR1,  # SLURM --signal, Grid Engine before a suspension
    signal.SIGUSR2,  # LSF before the run limit, Grid Engine before a kill
    signal.SIGXCPU,  # the limit of CPU time
    *([signal.SIGPWR] if hasattr(signal, "SIGPWR") else []),  # the host or container goes down
)
"""Each stops a run as SIGTERM does: the step is finished and saved, and the exit code is 75.

SIGQUIT keeps its meaning of a core dump, and SIGKILL and SIGSTOP cannot be caught.
"""
