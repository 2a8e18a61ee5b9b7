"""Paths as users write them: `~` is the home folder, everywhere."""

import os
import re

from spectral_scale.errors import ConfigError

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def user_path(text: str, *, what: str) -> str:
    """A path with a leading `~` or `~user` expanded.

    Raises ConfigError for a user who does not exist and for `$NAME`, which only a shell expands: a
    folder of that literal name is never meant.
    """
    expanded = os.path.expanduser(text) if text.startswith("~") else text
    if expanded.startswith("~"):
        raise ConfigError(f"{what}={text}: there is no such home folder; write the whole path")
    found = _VARIABLE.search(text)
    if found:
        raise ConfigError(
            f"{what}={text}: {found.group()} is not expanded here; write the whole path, or let "
            "the shell expand it"
        )
    return expanded
