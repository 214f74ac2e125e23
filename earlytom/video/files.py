"""Which video files are meant, and which content a file has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import VideoError
from .source import check_file

SUFFIXES = (".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
            ".ts", ".vob", ".webm", ".wmv")
"""What is taken for a video in a directory; a file that is named is taken whatever its name."""

BLOCKS, BLOCK = 64, 2**14  # bytes of a file that its identity is made of: all of one up to 1 MiB


def find_videos(named: Sequence[str]) -> list[Path]:
    """The videos that are meant by files, directories and lists (@FILE: one of either a line), each once, in order.

    Of a directory, everything below it with a video's suffix, hidden names apart, by name. Paths in a list are taken as
    they are on a command line. Whether a file is there, and a video, is not looked into. Raises VideoError for a
    directory without videos, or a list that cannot be read or is empty.
    """
    found: dict[str, Path] = {}
    for name in named:
        for path in _read_list(Path(name[1:])) if name.startswith("@") else [Path(name)]:
            for video in _inside(path) if path.is_dir() else [path]:
                found.setdefault(os.path.realpath(video), video)
    return list(found.values())


def _read_list(path: Path) -> Iterator[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"the list of videos {path} cannot be read: {reason}") from None
    if not (names := [line.strip() for line in lines if line.strip()]):
        raise VideoError(f"the list of videos {path} is empty: one path a line is needed")
    yield from map(Path, names)


def _inside(directory: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names
                  if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise VideoError(f"no video lies in the directory {directory}: names that end in {', '.join(SUFFIXES)} "
                         "are taken for one")
    return sorted(found)


def content_identity(path: Path) -> str:
    """A digest of a file's size and of blocks spread evenly over it, ends included: milliseconds for any size.

    Files of up to 1 MiB count whole. Of a longer one, a change between the blocks that leaves its size is not seen: no
    other recording, encoding or cut does that. Raises VideoError for what is no readable file.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(f"{size}\n".encode())
            whole = size <= BLOCKS * BLOCK
            for at in range(BLOCKS):
                file.seek(at * BLOCK if whole else (size - BLOCK) * at // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise VideoError(f"{path}: the file cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()
