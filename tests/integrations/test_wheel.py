"""The wheel as a user installs it: in an environment of its own, from another directory, no checkout in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_layout import PACKAGES, ROOT, modules

pytestmark = pytest.mark.integration


def call(*command: str | Path, cwd: Path, environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing of a build folder or of an egg-info slips in."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    for name in call("git", "ls-files", cwd=ROOT).splitlines():
        if name.startswith(PACKAGES) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "uv", "build", "--wheel", "--python", sys.executable, "-o", work / "dist", cwd=source)
    (built,) = (work / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a clean environment that holds the wheel and what it depends on."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    call(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, home, cwd=wheel.parent)
    call(
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", home / "bin" / "python",
        "-c", ROOT / "constraints.txt", wheel, cwd=wheel.parent,
    )
    return home / "bin"


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {str(file.relative_to(ROOT)) for name, file in modules().items() if name.split(".")[0] != "scripts"}
    assert {name for name in held if name.endswith(".py")} == ours


def test_the_wheel_holds_the_weights_of_the_demo(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert [name for name in names if not name.endswith(".py")] == ["earlytom/demo/weights.safetensors"]


def test_the_commands_work_from_another_directory(installed: Path, tmp_path: Path) -> None:
    """Export, verify and ask the demo; a clip is drawn by the installed package itself."""
    environ = {"PATH": f"{installed}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    paths = call(installed / "python", "-c", "import export, sys; print(sys.path)", cwd=tmp_path, environ=environ)
    assert str(ROOT) not in paths
    call("earlytom-clip", "clip.mp4", "--frames", "40", cwd=tmp_path, environ=environ)
    made = call(
        "earlytom-export", "--retain", "0.1", "--output", "demo", "--engine", "onnxruntime", "--json", "--quiet",
        cwd=tmp_path, environ=environ,
    )
    assert {hop["status"] for hop in json.loads(made)["parity"]} == {"passed"}
    assert json.loads(call("earlytom-verify", "demo", "--json", cwd=tmp_path, environ=environ))["passed"]
    answer = json.loads(
        call(
            "earlytom-infer", "--bundle", "demo", "--video", "clip.mp4", "--prompt", "What happens in this video?",
            "--max-new-tokens", "4", "--json", cwd=tmp_path, environ=environ,
        )
    )
    assert answer["engine"] == "onnxruntime"
    assert answer["answers"][0]["text"] and 1 <= len(answer["answers"][0]["ids"]) <= 4
