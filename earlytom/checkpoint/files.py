"""Files of a checkpoint: its JSON, its safetensors files, and which tensor is where. No tensor is read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .keys import Stored

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, it must hold an object")
    return value


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
