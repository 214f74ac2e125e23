"""The contract between exporting and running: a directory with a graph, engines, and a manifest that vouches for them.

A bundle is flat: `vision.onnx`, `vision.onnx.data`, engines such as `vision.sm80.rtx.engine`, `report.md` and
`manifest.json`, which lists every other file with size and SHA-256 and ends in a digest of itself. A file that it does
not list is never used. The digests find damage, mixed-up copies and edits by hand; they are no signature: who wants to
deceive can compute them anew.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earlytom.errors import BundleError, CheckpointError, EarlyTomError

from .manifest import MANIFEST, FileRecord, Manifest

if TYPE_CHECKING:
    from earlytom.checkpoint import CheckpointIdentity

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `read_bundle` makes it."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where the file `name` lies. Raises BundleError when the manifest does not vouch for it."""
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no {name} in its manifest, so it is not used")
        return self.path / name

    def verify(self, *names: str, content: bool = True) -> None:
        """Raise BundleError unless the files (default: all) have the size and SHA-256 that the manifest says.

        All sizes are looked at before anything is hashed; content: False stops there.
        """
        wrong = []
        paths = [(self.file(name), self.manifest.files[name]) for name in names or sorted(self.manifest.files)]
        try:
            for path, record in paths:
                if not path.is_file():
                    wrong.append(f"{path.name} is missing")
                elif (size := path.stat().st_size) != record.bytes:
                    wrong.append(f"{path.name} has {size} bytes where the manifest says {record.bytes}")
            if content and not wrong:
                wrong = [f"{path.name} was changed (SHA-256)" for path, record in paths if digest_file(path) != record]
        except OSError as error:
            wrong.append(f"{error.filename} cannot be read ({error.strerror})")
        if wrong:
            raise BundleError(f"the bundle {self.path} is damaged: {'; '.join(wrong)}; copy or export it again")

    def check_weights(self, identity: CheckpointIdentity) -> None:
        """Raise CheckpointError unless the bundle was made from the checkpoint that `identity` names."""
        if identity.digest != self.manifest.checkpoint["digest"]:
            raise CheckpointError(
                f"the bundle {self.path} was made from other weights than {identity.name} holds now: export it again, "
                "or give the checkpoint it was made from with --checkpoint"
            )


def read_bundle(path: Path | str, *, check: bool = True) -> Bundle:
    """The bundle at `path`, refused with a BundleError when it is not whole.

    check: hash every file (about 1 s for 1 GB); without it existence and size are still checked, and `Bundle.verify`
    can hash what is used.
    """
    path = Path(os.path.abspath(path))
    if not os.path.isdir(path):  # not Path's own, which raises for a name that no file can have
        there = os.path.exists(path)
        raise BundleError(f"{path} {'is a file, a bundle is a directory' if there else 'does not exist'}")
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error.strerror})") from None
    try:
        bundle = Bundle(path, Manifest.from_json(text))
    except EarlyTomError as error:
        raise BundleError(f"{path / MANIFEST} is refused: {error}") from None
    bundle.verify(content=check)
    return bundle


def find_same(path: Path | str, key: str) -> Bundle | None:
    """The intact bundle at `path` that a run with the same request wrote, or None."""
    try:
        bundle = read_bundle(path)
    except BundleError:
        return None
    return bundle if key and bundle.manifest.request_key == key else None


def digest_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, as a manifest records them."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(digest.hexdigest(), size)
