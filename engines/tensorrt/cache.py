"""Kernels that TensorRT for RTX compiled on this card, kept beside the bundle so that the next load need not.

One file for each engine, version and model of card, `vision.sm80.rtx.engine.1.7.1.116.nvidia-a100.sm80.cache`; a bundle
tolerates such files and never lists them: what verifying leaves in one that is being written goes with its commit. A
file is read back only if it is whole and was made from this very engine, and then the library judges it once more. It
saves time and nothing else: whatever goes wrong with it is passed over.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from earlytom.files import replacing

from ..cards import Card

MAGIC = b"earlytom runtime cache 1\n"
_DIGEST = hashlib.sha256().digest_size


def cache_path(engine: Path, version: str, card: Card) -> Path:
    """Beside the engine's file."""
    return engine.with_name(f"{engine.name}.{version}.{card.file_part}.cache")


class CacheFile:
    """The file at `path` for the engine whose SHA-256 is `engine` (hexadecimal)."""

    def __init__(self, path: Path, engine: str) -> None:
        self.path = path
        self._engine = bytes.fromhex(engine)

    def read(self) -> bytes | None:
        """What was kept, or None when there is nothing, or nothing that can be trusted to be whole."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        start = len(MAGIC) + 2 * _DIGEST
        payload = content[start:]
        whole = content[:start] == MAGIC + self._engine + hashlib.sha256(payload).digest()
        return payload if whole and payload else None

    def write(self, payload: bytes) -> bool:
        """Keep `payload`: the file is the old one or the new one, never half. False when it cannot be written."""
        try:
            with replacing(self.path) as temporary:
                temporary.write_bytes(MAGIC + self._engine + hashlib.sha256(payload).digest() + payload)
        except OSError:
            return False
        return True
