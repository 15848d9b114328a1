"""Files and folders: whatever names one is taken, folders are made, and a file is written in one stroke."""

import os
from collections.abc import Callable
from pathlib import Path

from blockdance.errors import ConfigError

AnyPath = str | os.PathLike[str]
"""What names a file or folder."""


def ready_for(file: AnyPath) -> Path:
    """The file, which can be written now; folders that are missing are made. To be asked before anything long is done for it.

    Raises:
        ConfigError: a folder is in its place, or a folder of it cannot be made or written to.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written, its folder cannot be made: {error.strerror}") from None
    if file.is_dir():
        raise ConfigError(f"{file} cannot be written, it is a folder")
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{file} cannot be written, its folder is not open to you")
    return file


def written(file: AnyPath, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside it, and then put that in its place, so that it is never there by half.

    Raises:
        ConfigError: it cannot be written.
    """
    file = ready_for(file)
    new = file.with_name(file.name + ".new")
    write(new)
    new.replace(file)
