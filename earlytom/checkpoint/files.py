"""Safetensors files of a checkpoint: which tensor is where, reading the ones that are asked for, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .formats import CheckpointConfig, read_json
from .keys import Slot, Stored, locate

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLE = 4096  # bytes of each vision tensor that go into the digest


def wanted(key: str, format: str, parts: Sequence[str], *, unknown: bool = False) -> bool:
    """Whether a tensor belongs to one of `parts`; `unknown` is the answer for a name that no table knows."""
    slot = locate(key, format)
    return unknown if slot is None else slot[0] in parts


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint, by its index. Raises CheckpointError."""
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{directory / INDEX} has no weight_map from tensor names to files")
    odd = sorted({f for f in weight_map.values() if Path(f).name != f or not f.endswith(".safetensors")})
    if odd:
        raise CheckpointError(f"{directory / INDEX} names what is no safetensors file beside it: {', '.join(odd)}")
    return weight_map


def tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file. Where there is an index nothing else is opened. Raises CheckpointError."""
    if (directory / INDEX).is_file():
        return read_index(directory)
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
        if pickles:
            raise CheckpointError(
                f"{directory} holds only pickled weights ({pickles[0]}), which are never read: convert them to "
                "safetensors, for example with save_pretrained of the library that wrote them"
            )
        raise CheckpointError(f"{directory} holds a config.json but no weights: there is no safetensors file in it")
    names = [SINGLE] if SINGLE in names else names
    return {key: name for name in names for key in read_header(directory / name)}


def read_header(path: Path) -> dict[str, Stored]:
    """Tensor name -> where and what it is in a safetensors file; no tensor is read.

    Source: the safetensors format, 8 bytes of little-endian header length, then JSON. Raises CheckpointError when the
    file is not that, or when it is shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        first = 8 + length
        header = {}
        for key, entry in entries.items():
            start, stop = (first + int(offset) for offset in entry["data_offsets"])
            header[key] = Stored(str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not a safetensors file, or its beginning is damaged") from None
    end = max((tensor.stop for tensor in header.values()), default=first)
    if end != size:
        raise CheckpointError(f"{path} is damaged: it is {size} bytes long, its header describes {end}; fetch it again")
    return header


def read_tensors(
    directory: Path, files: Mapping[str, str], found: Mapping[Slot, str], dtype: torch.dtype, device: torch.device
) -> dict[Slot, Tensor]:
    """The tensors of `found` (slot -> stored name), read one at a time, cast to `dtype` and moved to `device`.

    files: stored name -> file. Raises CheckpointError.
    """
    by_file: dict[str, list[tuple[Slot, str]]] = defaultdict(list)
    for slot, key in found.items():
        by_file[files[key]].append((slot, key))
    tensors = {}
    for file, items in by_file.items():
        try:
            with safe_open(directory / file, framework="pt", device="cpu") as shard:
                for slot, key in items:  # a copy: what safe_open gives is a view of the mapped file
                    tensors[slot] = shard.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / file} cannot be read: {error}") from None
    return tensors


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
