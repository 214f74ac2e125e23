"""Imports run one way, scripts → export → engines → earlytom, and importing a package costs nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("earlytom", "engines", "export", "scripts")  # each may import itself and those before it
OWNERS = {
    "tensorrt": {"engines"},
    "tensorrt_rtx": {"engines"},
    "onnxruntime": {"engines", "export"},
    "polygraphy": {"engines", "export"},
    "onnx": {"export"},
    "onnx_ir": {"export"},
    "onnxscript": {"export"},
    "torch.onnx": {"export"},
}
HEAVY = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "av")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module, with `import_module("x")` and `torch.onnx.y`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "onnx"):
                yield node.lineno, "torch.onnx"


def complaints(package: str, source: str) -> list[str]:
    """What a module of `package` imports and must not."""
    wrong = set()
    for line, name in imported(source):
        top = name.split(".")[0]
        if top in PACKAGES and PACKAGES.index(top) > PACKAGES.index(package):
            wrong.add(f"line {line}: {package} must not import {top}")
        if top == "tests":
            wrong.add(f"line {line}: {package} must not import tests")
        for owned, owners in OWNERS.items():
            if (name == owned or name.startswith(owned + ".")) and package not in owners:
                wrong.add(f"line {line}: only {' and '.join(sorted(owners))} may import {owned}")
    return sorted(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [f"{file.relative_to(ROOT)} {text}" for file in files for text in complaints(package, file.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("earlytom", "import engines.onnxruntime"),
        ("earlytom", "def f():\n    from export import cli"),
        ("engines", "from export.rules import check"),
        ("engines", "import onnx"),
        ("export", "import scripts.infer"),
        ("export", "import importlib\nrtx = importlib.import_module('tensorrt_rtx')"),
        ("earlytom", "import torch\ntorch.onnx.export"),
        ("earlytom", "from torch import onnx"),
        ("scripts", "import onnxruntime as ort"),
        ("earlytom", "import tests.clips"),
    ],
)
def test_the_check_sees_a_wrong_import(package: str, source: str) -> None:
    assert complaints(package, source)


def test_the_check_lets_right_imports_pass() -> None:
    assert not complaints("scripts", "import earlytom, engines.onnxruntime\nfrom export import cli")
    assert not complaints("export", "import onnx, onnxruntime, torch.onnx\nimport engines")
    assert not complaints("engines", "import tensorrt_rtx\nfrom engines.onnxruntime import run")  # not ONNX Runtime's


@pytest.mark.parametrize("package", ["earlytom", "engines", "export"])
def test_importing_is_lean(package: str) -> None:
    """Neither ONNX, an engine nor a codec is loaded, and CUDA is not touched, until something needs them."""
    program = (
        f"import json, sys, {package}\n"
        f"torch = sys.modules.get('torch')\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        f"print(json.dumps([heavy, bool(torch and torch.cuda.is_initialized())]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heavy, cuda = json.loads(done.stdout.splitlines()[-1])
    assert not heavy and not cuda
