"""Paths that a user names for what is to be written: whether it can be, asked before the work."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from earlytom.errors import ConfigError


def named_path(path: Path | str, what: str) -> Path:
    """The absolute path, links followed. Raises ConfigError for a name that is no text, or that no file can have."""
    try:
        os.fsencode(path).decode("utf-8")
        if "\0" in os.fspath(path):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{what} is {os.fspath(path)!r}: a path must be UTF-8, without null characters") from None
    return Path(os.path.realpath(path))


def make_directories(path: Path, made: list[Path]) -> None:
    """Make `path` and what is missing above it, each listed in `made` before it is there. Raises OSError."""
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        made.append(missing)
        missing.mkdir(exist_ok=True)


def remove_directories(made: list[Path]) -> None:
    """Remove the directories that `make_directories` made, as far as they are empty."""
    for directory in reversed(made):
        with contextlib.suppress(OSError):  # holds what was made, or something of somebody else
            directory.rmdir()


def check_directory(path: Path | str, what: str) -> Path:
    """The absolute path of a directory that files can be written to, there already or not; leaves no trace of asking.

    what: its name for people, "the timing cache". Raises ConfigError.
    """
    directory, made = named_path(path, what), list[Path]()
    probe = directory / f".{secrets.token_hex(4)}.tmp"
    try:
        make_directories(directory, made)
        probe.write_bytes(bytes(4096))  # a full disk takes an empty file
    except OSError as error:
        raise ConfigError(f"{what} {directory} cannot be written to: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        remove_directories(made)
    return directory
