"""Every release of transformers that is supported, in an environment of its own: the golden answers, `earlytom(model)`
on live models, LLaVA-NeXT's own class among them, and a bundle's answers. README's matrix says what these runs say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integrations.test_wheel import call
from tests.integrations.test_wheel import wheel as wheel
from tests.test_layout import ROOT

pytestmark = pytest.mark.integration

OLDER = ("4.49.0", "4.51.3", "4.53.3", "4.55.4", "4.57.6")
REAL = ("4.49.0", "4.51.3")  # later ones lack what LLaVA-NeXT imports
TESTS = (
    "tests/earlytom/language", "tests/earlytom/test_wrap.py", "tests/earlytom/test_calls.py",
    "tests/earlytom/test_spread.py", "tests/engines/test_live.py",
)
QUESTION, ANSWER = "Which shape comes first: cross, diamond, circle or star?", "\nStar\n"  # of clip 1
EXPECTED = ("needs transformers 5", "transformers before 4.5")  # why a test may be skipped
SOURCE = "https://github.com/LLaVA-VL/LLaVA-NeXT"
# Column of README's matrix -> the tests behind it, by "module::name". "no" is where all of them are skipped.
MATRIX = {
    "Qwen2 with inner merging": r"test_qwen2::",
    "`LlavaQwenForCausalLM`": r"real_llava_next::",
    "`LlavaOnevision…`": r"test_wrap::.*onevision|test_calls::test_a_batch",
    "image beside a video": r"test_calls::test_an_image_and_a_video",
    "`bundle=`": r"test_live::",
    "device map": r"test_spread::",
    "second question from the cache": r"test_conversation::test_a_second_question",
    "`--compile`": r"test_conversation::test_compiled_decoding_gives",
}


def pinned(*without: str) -> str:
    """constraints.txt without these packages."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if re.split(r"[=\[ ;]", line)[0] not in without)


@pytest.fixture(scope="module", params=OLDER)
def older(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A release, and the interpreter of an environment with it, the wheel and what the tests need."""
    return request.param, environment(request.param, wheel, tmp_path_factory.mktemp(f"transformers-{request.param}"))


def environment(version: str, wheel: Path, home: Path) -> Path:
    """The interpreter of a new environment in `home` with that transformers, the wheel and what the tests need."""
    python = home / "venv" / "bin" / "python"
    call(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, home / "venv", cwd=home)
    (home / "constraints.txt").write_text(pinned("transformers", "huggingface-hub", "hf-xet", "tokenizers"))
    call(
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, "-c", home / "constraints.txt",
        f"earlytom-export[device-map] @ {wheel.as_uri()}", f"transformers=={version}", "pytest", "pytest-xdist",
        "hypothesis", "einops", "requests", cwd=home,
    )
    return python


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout("LLAVA_NEXT", SOURCE, tmp_path_factory.mktemp("llava"), "LLaVA-NeXT's own class is NOT tested")


def checkout(variable: str, source: str, home: Path, otherwise: str) -> Path:
    """A checkout of a public repository: the one that the environment names, or cloned. Skips loudly without."""
    if variable in os.environ:
        return Path(os.environ[variable])
    home = home / "source"
    command = ["git", "clone", "--quiet", "--depth", "1", source, str(home)]
    environ = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)
        reason = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if reason:
        pytest.skip(f"{otherwise}: {reason}; set {variable} to a checkout of {source}")
    return home


def outcomes(python: Path | str, report: Path, *tests: str, **environ: str) -> dict[str, str]:
    """"module::name" of each test -> "passed" or "skipped", from running them with that interpreter."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "EARLYTOM_", "OMP_"))}
    call(
        python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}", *tests, cwd=ROOT,
        environ=kept | environ,
    )
    found = {}
    for case in ET.parse(report).iter("testcase"):
        reasons = [skipped.get("message", "") for skipped in case.iter("skipped")]
        assert all(reason.startswith(EXPECTED) for reason in reasons), reasons
        found[f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"] = "skipped" if reasons else "passed"
    return found


def readme(version: str) -> Mapping[str, str]:
    """The row of README's matrix whose first cell is that release."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head = next(row for row in rows if row[:2] == ["transformers", "torch"])
    (row,) = (row for row in rows if row[0] == version)
    return dict(zip(head, row, strict=True))


def check(row: Mapping[str, str], found: Mapping[str, str], columns: set[str]) -> None:
    """That a row of README's matrix says of these columns what was found."""
    said = {}
    for column in columns:
        results = {result for name, result in found.items() if re.search(MATRIX[column], name)}
        assert results, f"no test stands behind {column}"
        said[column] = "yes" if "passed" in results else "no"
    assert {column: row[column] for column in columns} == said


def torch_of(python: Path | str) -> str:
    return call(python, "-c", "import torch; print('.'.join(torch.__version__.split('.')[:2]))", cwd=ROOT).strip()


def test_an_older_release_gives_the_golden_answers(older: tuple[str, Path], tmp_path: Path) -> None:
    version, python = older
    found = outcomes(python, tmp_path / "report.xml", *TESTS)
    check(readme(version), found, set(MATRIX) - {"`LlavaQwenForCausalLM`"})
    assert sum(result == "passed" for result in found.values()) > 100
    if sys.version_info >= (3, 11):
        assert readme(version)["torch"] == torch_of(python)


def test_what_an_older_release_lacks_is_refused_in_one_sentence(older: tuple[str, Path], tmp_path: Path) -> None:
    """The commands work, but for what needs transformers 5."""
    version, python = older
    environ = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    call("earlytom-clip", "clip.mp4", "--index", "1", cwd=tmp_path, environ=environ)
    call("earlytom-export", "--retain", "0.2", "--engine", "onnxruntime", "--no-verify", "--quiet", "--output", "demo",
         cwd=tmp_path, environ=environ)
    ask = ["earlytom-infer", "--bundle", "demo", "--video", "clip.mp4", "--prompt", QUESTION]
    assert ANSWER in call(*ask, cwd=tmp_path, environ=environ)
    done = subprocess.run([*ask, "--compile"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"compiled decoding needs transformers 5, this is {version}" in done.stderr


def test_llava_nexts_own_class(older: tuple[str, Path], llava_next: Path, tmp_path: Path) -> None:
    version, python = older
    if version not in REAL:
        assert readme(version)["`LlavaQwenForCausalLM`"] == "no"
        return
    tests = "tests/integrations/real_llava_next.py"
    found = outcomes(python, tmp_path / "report.xml", tests, LLAVA_NEXT=str(llava_next))
    check(readme(version), found, {"`LlavaQwenForCausalLM`"})
    assert set(found.values()) == {"passed"}


def test_the_release_of_the_constraints_has_everything(tmp_path: Path) -> None:
    found = outcomes(sys.executable, tmp_path / "report.xml", *TESTS)
    row = readme("5")
    check(row, found, set(MATRIX) - {"`LlavaQwenForCausalLM`"})
    assert set(found.values()) == {"passed"}
    if sys.version_info >= (3, 11):
        assert row["torch"] == torch_of(sys.executable)
