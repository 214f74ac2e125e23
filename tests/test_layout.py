"""The house: imports run one way and in no circle, files stay short, names stay where users import them from."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("earlytom", "engines", "export", "scripts")  # each may import itself and those before it
LONGEST = 300  # lines of a file
OWNERS = {
    "tensorrt": {"engines"},
    "tensorrt_rtx": {"engines"},
    "onnxruntime": {"engines", "export"},
    "polygraphy": {"engines", "export"},
    "onnx": {"export"},
    "onnx_ir": {"export"},
    "onnxscript": {"export"},
    "torch.onnx": {"export"},
    "lmms_eval": {"engines"},
}
HEAVY = (
    "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "av", "PIL", "lmms_eval",
)
# What users were told to import, by module: these names stay, wherever the definitions move.
PUBLIC = {
    "earlytom": "AdaptiveTower EarlyTomConfig InnerMerging Model StaticTower TowerOutputs VideoPipeline VisionGeometry "
    "earlytom encode_video generate load preset read_frames restore",
    "earlytom.config": "EarlyTomConfig InnerMerging",
    "earlytom.presets": "preset",
    "earlytom.frames": "similarity segments merge_rules plan apply_plan",
    "earlytom.clustering": "dpc_knn merge_clusters",
    "earlytom.inner": "InnerMerging merge_tokens merge_tokens_dpc_knn",
    "earlytom.reference": "encode_video frame_counts merge_frames segment_frames select_tokens",
    "earlytom.tower": "StaticTower TowerOutputs",
    "earlytom.shapes": "StaticShapes VisionGeometry derive_shapes",
    "earlytom.checkpoint": "load Model CheckpointIdentity",
    "earlytom.video": "read_frames VideoFrames",
    "earlytom.parity": "oracle_trace judge measure",
    "export": "ExportOptions EngineOptions add_engine export",
    "export.onnx": "export_tower check_graph with_traced_outputs",
    "export.verify": "verify_bundle",
    "export.cli": "main verify_main build_main",
    "engines": "open_pipeline open_runner read_bundle",
    "engines.onnxruntime": "OnnxRuntimeRunner",
    "engines.runner": "Runner OpenOptions",
    "scripts.infer": "main",
    "scripts.bench": "main",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a module that lies in `package`.

    By name too: `import_module("x")`, `torch.onnx.y`, and strings that are a module's name or a program that imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "onnx"):
                yield node.lineno, "torch.onnx"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            ours = rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+"
            names = re.findall(rf"^(?:from|import) ({ours})", node.value, re.MULTILINE)
            yield from ((node.lineno, name) for name in [*names, *re.findall(rf"^{ours}$", node.value)])


def complaints(package: str, source: str) -> list[str]:
    """What a module of `package` imports and must not."""
    wrong = set()
    for line, name in imported(source, package):
        top = name.split(".")[0]
        if top in PACKAGES and PACKAGES.index(top) > PACKAGES.index(package.split(".")[0]):
            wrong.add(f"line {line}: {package} must not import {top}")
        if top == "tests":
            wrong.add(f"line {line}: {package} must not import tests")
        for owned, owners in OWNERS.items():
            if (name == owned or name.startswith(owned + ".")) and package.split(".")[0] not in owners:
                wrong.add(f"line {line}: only {' and '.join(sorted(owners))} may import {owned}")
    return sorted(wrong)


def package_of(module: str, file: Path) -> str:
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, in functions and by name included."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, file in known.items():
        names = {name for _, name in imported(file.read_text(encoding="utf-8"), package_of(module, file))}
        # `from package import module` names both; the package itself counts only when no module of it is meant
        deeper = {name.rpartition(".")[0] for name in names if name in known}
        graph[module] = {name for name in names if name in known and name not in deeper} - {module}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_run_one_way() -> None:
    found = modules()
    assert {name.split(".")[0] for name in found} == set(PACKAGES)
    wrong = [
        f"{file.relative_to(ROOT)} {text}"
        for name, file in found.items()
        for text in complaints(package_of(name, file), file.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_part_of_a_circle() -> None:
    assert not (found := circle(import_graph())), " -> ".join(found)


def test_no_room_is_part_of_a_circle() -> None:
    """A room is a sub-package, or a file directly in one of the four packages."""
    rooms: dict[str, set[str]] = {}
    for module, names in import_graph().items():
        room = ".".join(module.split(".")[:2])
        rooms.setdefault(room, set()).update(other for n in names if (other := ".".join(n.split(".")[:2])) != room)
    assert not (found := circle(rooms)), " -> ".join(found)


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in modules().values()}
    assert not {file: lines for file, lines in lengths.items() if lines > LONGEST}


def test_tests_lie_as_what_they_test() -> None:
    """A folder of tests for each folder of ours that has any, under the same name."""
    folders = {path.parent.relative_to(ROOT / "tests") for p in PACKAGES for path in (ROOT / "tests" / p).rglob("*.py")}
    assert len(folders) > 8 and not [folder for folder in folders if not (ROOT / folder).is_dir()]
    assert not [p for p in (ROOT / "tests").glob("test_*.py") if p.stem not in ("test_layout", "test_readme")]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_importable(module: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("earlytom", "import engines.onnxruntime"),
        ("earlytom", "def f():\n    from export import cli"),
        ("engines", "from export.rules import check"),
        ("engines", "import onnx"),
        ("engines.bundle", "from ...export import cli"),
        ("engines", "PROGRAM = '''import sys\nfrom export.cli import main\nmain()'''"),
        ("engines", "HOME = {'build': 'export.build'}"),
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
    assert not complaints("engines.tensorrt", "from ..bundle import reader\nfrom .build import x")


def test_the_check_sees_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


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


@pytest.mark.parametrize(
    "program",
    [
        "import earlytom.config",
        "import earlytom.presets",
        "import engines.bundle.manifest",
        "from export.cli import main; main(['--help'])",
        "from export.cli import main; main(['--version'])",
        "from export.cli import verify_main; verify_main(['--help'])",
        "from export.cli import build_main; build_main(['--help'])",
        "from export.cli import build_main; build_main(['bundle', '--engine', 'onnxruntime'])",
        "import export, export.settings, engines.products, engines.bundle.manifest, earlytom.dtypes",
        "from engines.infer import main; main(['--help'])",
        "from engines.clip import main; main(['--help'])",
        "from engines.eval import main; main(['--help'])",
        "from engines.bench import main; main(['--help'])",
        "from engines.bench import main; main(['--contestants', 'fastest'])",
        "from engines.bench import main; main(['--compare', 'a.json', 'b.json'])",
        "from engines.eval import main; main(['--suite', 'demo', '--questions', '0'])",
        "from engines.eval import main; main(['--table', 'missing_results.json'])",
        "import engines.lmms.manifest, engines.lmms.arguments, engines.lmms.questions, engines.lmms.table",
        "from export.calibration.command import main; main(['--help'])",
        "from export.calibration.command import main; main(['v', '--percentile', '101'])",
        "import earlytom.calibration.budgets, earlytom.calibration.preset_file, earlytom.calibration.result",
        "import earlytom.demo.suite, earlytom.demo.report, earlytom.demo.table, earlytom.demo.score",
        "from engines.infer import main; main(['--bundle', 'b', '--video', 'v', '--prompt', 'p', '--threads', '0'])",
    ],
)
def test_settings_help_and_usage_errors_need_no_torch(program: str) -> None:
    """What is typed wrong is told at once: torch alone takes seconds to import."""
    program = f"import atexit, sys\natexit.register(lambda: print('loaded', 'torch' in sys.modules))\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout.endswith("loaded False\n"), done
