"""Packages that only some backends need: what was tested, and how they are installed."""

from importlib.metadata import PackageNotFoundError, version

from spectral_scale.errors import ConfigError

PACKAGES: dict[str, tuple[str, str | None]] = {
    "deepspeed": ("deepspeed", None),
    "megatron": ("megatron-core", "0.16"),
}
"""Backend (also the name of the extra that installs it) -> its package, and the beginning of the
versions that it was tested with if others are refused."""


def require_package(backend: str, *, what: str) -> None:
    """Raise ConfigError if a backend's package is missing or of a version that was not tested.

    Args:
        backend: one that needs no package is always there.
        what: needs it; the error begins with this.
    """
    if backend not in PACKAGES:
        return
    package, versions = PACKAGES[backend]
    remedy = f"install it with: pip install 'spectral-scale[{backend}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigError(
            f"{what} needs the package {package}, which is not installed; {remedy}"
        ) from None
    if versions is not None and not found.startswith(f"{versions}."):
        raise ConfigError(
            f"{what} was tested with {package} {versions}, and {found} is installed; {remedy}"
        )
