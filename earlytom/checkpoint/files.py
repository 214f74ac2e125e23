"""Files of a checkpoint: its JSON, its safetensors files, and which tensor is where. No tensor is read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
        pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pth", ".pt"))
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

    The library checks the whole header when it opens a file (sizes that overflow, holes, overlaps, a file that is
    longer or shorter), so that the offsets, which it does not hand out, can be read from the JSON as they stand.
    Source: the safetensors format, 8 bytes of little-endian header length, then JSON. Raises CheckpointError.
    """
    try:
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            first = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(first - 8))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or it is damaged or not whole ({path.stat().st_size} bytes): {error}"
        ) from None
    entries.pop("__metadata__", None)
    return {
        key: Stored(entry["dtype"], tuple(entry["shape"]), *(first + offset for offset in entry["data_offsets"]))
        for key, entry in entries.items()
    }
