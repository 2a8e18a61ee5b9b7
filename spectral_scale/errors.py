"""The package's errors: one small hierarchy. Imports nothing.

Every message says what was given, what is required, and what to do.
"""


class SpectralScaleError(Exception):
    """Base of every error a user can cause or must act upon. `exit_code` is the process's."""

    exit_code = 1


class ConfigError(SpectralScaleError):
    """A configuration that cannot run; nothing was started. Never worth a requeue."""

    exit_code = 78


class DataError(SpectralScaleError):
    """Input text, a tokenizer or a token folder that cannot be used; names file and offset."""

    exit_code = 78


class WorkerError(SpectralScaleError):
    """A loader process that cannot be started, died or failed; names it."""


class WaitingForDataError(SpectralScaleError):
    """A stop was asked for while a rank waited for data in vain; the last checkpoint is intact."""

    exit_code = 75


class CheckpointError(SpectralScaleError):
    """A checkpoint that cannot be written or read; older checkpoints are untouched."""


class ResumeMismatchError(ConfigError):
    """A run folder whose checkpoints belong to a different model, method or data."""


class LaunchError(SpectralScaleError):
    """Ranks that cannot meet: a port is taken, an address leads nowhere, a rank is missing."""


class NoProgressError(SpectralScaleError):
    """Several starts in a row saved nothing new; a scheduler must not start another."""

    exit_code = 93


class HealthError(SpectralScaleError):
    """Steps that again and again cannot be applied, or replicas that differ; names what it is."""


class LostRankError(SpectralScaleError):
    """Another rank died or hangs; names it. The last checkpoint is intact."""

    exit_code = 75


class SpectralError(SpectralScaleError):
    """A decomposition or swap that failed on an owner; names the matrix and the rank."""
