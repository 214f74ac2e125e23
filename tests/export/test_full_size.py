"""The full-size tower (so400m, random weights, 32 frames, LLM width 3584): export, rules, memory, a run. Minutes.

Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import DTYPES
from earlytom.shapes import VisionGeometry
from earlytom.vision.siglip import Vision
from earlytom.tower import StaticTower

def random_vision(dtype, pooling="bilinear", newline="one_token"):
    # No float32 copy on the way: parameters are made in their type and filled in place, small enough not to overflow.
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        vision = Vision(VisionGeometry(), pooling, newline)
    torch.set_default_dtype(torch.float32)
    vision = vision.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vision.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            spread = 0.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02
            parameter.data.normal_(0.0, spread, generator=generator)
    return vision.eval().requires_grad_(False)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""
EXPORT = BUILD + """
from export.onnx import check_graph, export_tower
path, dtype, opset, video = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "video"
vision = random_vision(getattr(torch, dtype), *(("average", "grid") if video else ()))
weights = sum(p.numel() * p.element_size() for p in vision.parameters())
settings = {"frames": 64, "pooling": "average", "newline": "grid"} if video else {}
tower = StaticTower(vision, EarlyTomConfig(retain=0.2, **settings))
start = time.time()
export = export_tower(tower, path, opset=opset)
exported = time.time()
used = peak()
summary = check_graph(path, dtype=next(d.name for d in DTYPES.values() if d.torch == dtype), opset=opset)
print(json.dumps({"weights": weights, "peak": used, "export_s": exported - start, "check_s": time.time() - exported,
                  "nodes": summary.nodes, "attention": sorted(summary.attention.values()),
                  "onnx_bytes": path.stat().st_size, "data_bytes": export.data.stat().st_size,
                  "constants": summary.largest_constants}))
"""
RUN = BUILD + """
import numpy as np
import onnxruntime as ort
path = Path(sys.argv[1])
video = np.load(sys.argv[2])["video"][None]
options = ort.SessionOptions()
options.intra_op_num_threads = 2
start = time.time()
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
loaded = time.time()
tokens, positions, dynamic, weights = session.run(None, {"frames": video})
run = time.time()
used = peak()
print(json.dumps({"load_s": loaded - start, "run_s": run - loaded, "peak": used, "tokens": tokens.shape,
                  "finite": bool(np.isfinite(tokens).all()), "rows": float(abs(weights.sum(-1) - 1).max())}))
"""


def measure(code: str, *arguments: object) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    numbers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(numbers)
    return numbers


@pytest.mark.parametrize(
    ("dtype", "opset", "model"),
    [
        ("float16", 20, "onevision"),
        ("bfloat16", 20, "onevision"),
        ("float16", 23, "onevision"),
        ("float16", 20, "video"),
    ],
)
def test_exports_and_keeps_the_rules_within_three_times_the_weights(
    tmp_path: Path, dtype: str, opset: int, model: str
) -> None:
    numbers = measure(EXPORT, tmp_path / "vision.onnx", dtype, opset, model)
    assert numbers["peak"] < 3 * numbers["weights"], "the whole process, Python and torch included"
    assert numbers["data_bytes"] < 1.01 * numbers["weights"], "a weight is stored twice"
    assert numbers["onnx_bytes"] < 4e6
    form = "operator" if opset >= 23 else "primitives"
    assert numbers["attention"] == [form] * 26


def test_runs_in_onnx_runtime(tmp_path: Path, golden: Path) -> None:
    measure(EXPORT, tmp_path / "vision.onnx", "float32", 20, "onevision")
    numbers = measure(RUN, tmp_path / "vision.onnx", golden / "e2e" / "frames.npz")
    assert numbers["tokens"] == [1, 8 * 157 + 1, 3584]
    assert numbers["finite"]
    assert numbers["rows"] < 1e-5
    assert numbers["peak"] < 24e9
