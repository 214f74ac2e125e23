"""What is dear to make and made once: for all tests, and for all workers when several run them."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from earlytom.checkpoint.demo import write_demo

HOME = "EARLYTOM_TESTS_HOME"  # conftest.py names the directory before workers start, and removes it


def make_home() -> tempfile.TemporaryDirectory[str]:
    home = tempfile.TemporaryDirectory(prefix="earlytom-tests-")
    os.environ[HOME] = home.name
    return home


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """A directory that `make` writes when it is first asked for; do not write into it, copy it."""
    path = Path(os.environ[HOME]) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path


def small_demo() -> Path:
    """The demo checkpoint cut down to what exports in seconds: frames of 196 x 196 (49 tokens), a tower of 2 layers."""
    return shared("small-demo", write_small_demo)


def write_small_demo(directory: Path) -> None:
    write_demo(directory, format="transformers", seed=0)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["image_size"] = 196
    (directory / "config.json").write_text(json.dumps(config | {"vision_feature_layer": 2}))
    tensors = load_file(directory / "model.safetensors")
    (name,) = (name for name in tensors if "position_embedding" in name)
    tensors[name] = tensors[name][: 14 * 14].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def demo_bundle() -> Path:
    """A verified bundle of `small_demo`, 8 frames, made by the command; alone in its directory."""
    return shared("demo-bundle", _export_demo) / "bundle"


def _export_demo(directory: Path) -> None:
    from export.cli import main

    directory.mkdir()
    assert main([*demo_arguments(), "--output", str(directory / "bundle")]) == 0


def demo_arguments() -> list[str]:
    """The options that `demo_bundle` is exported with."""
    return [
        "--checkpoint", str(small_demo()), "--frames", "8", "--retain", "0.25", "--engine", "onnxruntime",
        "--inner-layer", "3", "--quiet",
    ]
