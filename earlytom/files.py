"""Writing a file whole or not at all: what a reader, or the end of power, finds is the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to: it takes its place at the end, or is removed when the block raises.

    Raises OSError as the block, the disk and the directory do.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold `path` before anything that refers to it; directories only where the system allows."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # where late writing reports a full disk
            raise
    finally:
        os.close(handle)
