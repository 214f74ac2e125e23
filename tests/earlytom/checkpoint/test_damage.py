"""Damaged safetensors files, and weights that are not finite: one sentence each, before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from earlytom.checkpoint import load, loader
from earlytom.checkpoint.files import read_header
from earlytom.checkpoint.tensors import DTYPES, _finite
from earlytom.errors import CheckpointError
from tests.checkpoints import TOWER


@pytest.fixture
def tiny(golden: Path, tmp_path: Path) -> Path:
    """The golden checkpoint, to be changed."""
    return Path(shutil.copytree(golden / "e2e" / "tiny-llava-onevision", tmp_path / "tiny"))


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": TWO | {"shape": [2**40, 2**40]}},  # the number of bytes overflows 64 bits
        {"a": TWO | {"shape": [2**70]}},
        {"a": TWO | {"data_offsets": [0, 2**70]}},
        {"a": TWO | {"data_offsets": [0, 2**63]}},
        {"a": TWO | {"data_offsets": [-8, 0]}},
        {"a": TWO | {"shape": [-2]}},
        {"a": TWO | {"shape": [2.0]}},
        {"a": TWO | {"shape": [True, 2]}},
        {"a": TWO | {"shape": [3]}},  # other than its bytes
        {"a": TWO | {"shape": [1], "data_offsets": [4, 8]}},  # a hole
        {"a": TWO, "b": TWO},  # the same bytes twice
        {"a": TWO | {"dtype": "F33"}},
        {"a": TWO | {"dtype": None}},
        {"a": [0, 8]},
        {"a": TWO, "__metadata__": 3},
        [TWO],
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": ' + b"[" * 100_000,
        b"\xff\xfe{}",
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"^/.*model\.safetensors is not a safetensors file, or it") as caught:
        read_header(path)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    whole = save({"a": torch.ones(2)})
    path.write_bytes(whole)
    header = read_header(path)["a"]
    assert (header.dtype, header.shape, header.stop) == ("F32", (2,), len(whole)) and header.start == len(whole) - 8
    path.write_bytes(length.to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError, match="is not a safetensors file, or it is damaged"):
        read_header(path)


def test_a_file_cut_short_after_its_header_was_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loader.weights_digest  # the last that looks at the file before tensors are read

    def cut(*args: Any) -> Any:
        digest = real(*args)
        with (tiny / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)
        return digest

    monkeypatch.setattr(loader, "weights_digest", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        load(tiny)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tiny: Path, dtype: torch.dtype, value: float) -> None:
    """Whatever dtype it is stored and asked for in; other parts can be loaded."""
    key = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tiny / "model.safetensors")
    tensors[key] = tensors[key].to(dtype)
    tensors[key][2, 5:7] = value
    save_file(tensors, tiny / "model.safetensors")
    size = tensors[key].numel()
    message = rf": 2 of the {size} values of {key} are not finite \(the first, at \[2, 5\], is {value}\)"
    for asked in (torch.float32, torch.float16):
        with pytest.raises(CheckpointError, match=message):
            load(tiny, dtype=asked)
    assert load(tiny, parts=("vision",)).vision is not None


@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 100, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_place_in_a_tensor_hides_a_nan(size: int, dtype: torch.dtype) -> None:
    """The check is one vectorised pass: first, last and in the tail that no vector holds."""
    for at in {0, size // 2, size - 1}:
        tensor = torch.randn(size).to(dtype)
        assert _finite(tensor)
        tensor[at] = float("nan")
        assert not _finite(tensor)
    assert _finite(torch.empty(0, dtype=dtype))


def test_weights_that_overflow_half_precision_say_what_holds_them(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    key = f"{TOWER}.encoder.layers.2.mlp.fc1.weight"
    tensors[key][0, :3] = -1e5
    save_file(tensors, tiny / "model.safetensors")
    message = (
        rf"3 of the \d+ values of {key} overflow float16 \(the largest is 1e\+05, the limit 6\.55e\+04\); "
        "what holds them is bfloat16 or float32 or float64"
    )
    with pytest.raises(CheckpointError, match=message):
        load(tiny, dtype=torch.float16)
    assert load(tiny, dtype=torch.bfloat16).vision is not None
