"""Engines of the full-size tower (so400m, LLM width 3584, random weights) built without a GPU: time, memory. Minutes.

Builds run in a process of their own, so that peak memory is theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.test_full_size import EXPORT, ROOT

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
pytestmark = pytest.mark.slow

BUILD = """
import hashlib, json, resource, sys, time
from engines.bundle.manifest import Manifest
from earlytom.config import EarlyTomConfig
from earlytom.vision.geometry import VisionGeometry
from export.onnx.exporter import attention_form
from pathlib import Path
from engines.tensorrt.inspect import inspect_plan
from engines.tensorrt.build import BuildOptions, build_engine
path, dtype, opset, video, targets = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "video", sys.argv[5]
settings = {"frames": 64, "pooling": "average", "newline": "grid"} if video else {}
manifest = Manifest.derive(
    EarlyTomConfig(retain=0.2, **settings), VisionGeometry(), dtype=dtype, opset=opset, tools={},
    attention=attention_form(opset), checkpoint={"name": "random", "format": "none", "digest": "0"})
folder, start = path.rpartition("/")[0], time.time()
options = BuildOptions(targets=tuple(filter(None, targets.split(","))))
record = build_engine(path, manifest, folder, options)
seconds = time.time() - start
content = open(f"{folder}/{record.file}", "rb").read()
peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
plan = inspect_plan(Path(folder, record.file), manifest)
print(json.dumps({"file": record.file, "seconds": seconds, "bytes": len(content), "builder_peak": peaks[1],
                  "sha256": hashlib.sha256(content).hexdigest(), "kernels": plan.kernels, "fused": len(plan.fused),
                  "warnings": plan.warnings}))
"""


def run(script: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "opset", "geometry"),
    [
        pytest.param("fp16", "float16", 20, "image", id="fp16"),
        pytest.param("bf16", "bfloat16", 20, "image", id="bf16"),
        pytest.param("fp16", "float16", 23, "image", id="fp16, Attention operator"),
        pytest.param("fp16", "float16", 20, "video", id="fp16, LLaVA-Video, 64 frames"),
    ],
)
def test_an_a100_engine_in_a_minute_and_four_gigabytes(
    tmp_path: Path, dtype: str, torch_dtype: str, opset: int, geometry: str
) -> None:
    path = tmp_path / "vision.onnx"
    exported = run(EXPORT, path, torch_dtype, opset, geometry)
    built = run(BUILD, path, dtype, opset, geometry, "sm80")
    print(json.dumps(built))
    assert built["file"] == "vision.sm80.rtx.engine"
    assert built["seconds"] < 60 and built["builder_peak"] < 4 << 30
    assert 0.9 < built["bytes"] / exported["weights"] < 1.2
    assert (built["fused"], built["warnings"]) == (26, [])
    again = run(BUILD, path, dtype, opset, geometry, "sm80")
    assert again["sha256"] == built["sha256"]
    if (dtype, opset, geometry) == ("fp16", 20, "image"):
        several = run(BUILD, path, dtype, opset, geometry, "")
        print(json.dumps(several))
        assert several["bytes"] - built["bytes"] < 1 << 20
