"""Which checkpoint this is: its sizes, and a fingerprint that takes milliseconds."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..language.geometry import LanguageGeometry
from ..vision.geometry import VisionGeometry
from .files import read_header
from .formats import CheckpointConfig
from .keys import wanted

SAMPLE = 4096  # bytes of each vision tensor that go into the digest


@dataclass(frozen=True)
class CheckpointIdentity:
    """Which checkpoint this is.

    name: as given to `load`; format: "llava-next", "transformers" or "demo"; digest: see `weights_digest`; geometry,
    pooling, newline: of the vision side, the last two as in Vision; language_layers: decoder layers of the LLM;
    language: all its sizes, None where its configuration does not tell them. The same whichever parts were loaded.
    """

    name: str
    format: str
    digest: str
    geometry: VisionGeometry
    pooling: str
    newline: str
    language_layers: int
    language: LanguageGeometry | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def weights_digest(directory: Path, config: CheckpointConfig, files: Mapping[str, str]) -> str:
    """SHA-256, in hex, of what identifies a checkpoint, in milliseconds also where hashing 15 GB would take minutes.

    files: tensor name -> file, for all tensors. It covers config.json and the vision tower's configuration; the names
    of all tensors; of every vision tensor its dtype, its shape and its first 4096 bytes. It is the same for every
    choice of parts and for every sharding. It does not cover the language weights beyond their names: what is exported,
    and what digests are compared for, is the vision side, and loading that may not open the language files. A vision
    file that is not there counts as absent.
    """
    by_file: dict[str, list[str]] = defaultdict(list)
    for key, name in files.items():
        if wanted(key, config.format, ("vision",)):
            by_file[name].append(key)
    samples: list[tuple[Any, ...]] = []
    for name, keys in by_file.items():
        path = directory / name
        header = read_header(path) if path.is_file() else {}
        samples += [(key, "absent") for key in keys if key not in header]
        if header:
            with path.open("rb") as file:
                for key in header.keys() & set(keys):
                    tensor = header[key]
                    file.seek(tensor.start)
                    data = file.read(min(SAMPLE, tensor.stop - tensor.start))
                    samples.append((key, tensor.dtype, tensor.shape, hashlib.sha256(data).hexdigest()))
    content = {"version": 1, "source": config.source, "names": sorted(files), "vision": sorted(samples)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
