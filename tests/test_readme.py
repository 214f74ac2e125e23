"""Every command and every snippet of the README is one that works: run, or at least taken by the parser it is for."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from engines.bench import parser as bench_parser
from engines.clip import parser as clip_parser
from engines.eval import parser as eval_parser
from engines.infer import parser as infer_parser
from engines.lmms.arguments import parse_arguments
from export import settings
from export.calibration.command import parser as calibrate_parser
from export.cli import build_parser, export_parser, verify_parser
from tests import clips
from tests.bundles import golden_bundle
from tests.cases import TINY
from tests.llava_next import load_stand_in
from tests.shared import demo_bundle

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PARSERS = {
    "earlytom-export": export_parser, "earlytom-build": build_parser, "earlytom-verify": verify_parser,
    "earlytom-infer": infer_parser, "earlytom-clip": clip_parser, "earlytom-eval": eval_parser,
    "earlytom-calibrate": calibrate_parser,
    "earlytom-bench": bench_parser,
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command):
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = re.search(r"\[(.*)\]", arguments[-1]).group(1).split(",")
        project = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
        assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    elif program == "lmms-eval":  # which is not installed here; tests/integrations runs it
        assert arguments[arguments.index("--model") + 1] == "earlytom"
        parse_arguments(arguments[arguments.index("--model_args") + 1])
    elif program == "scripts/eval.sh":
        assert (ROOT / program).is_file()
    elif program == "python":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        PARSERS[program]().parse_args(arguments)


def test_the_readme_names_every_make_target_that_ci_calls():
    called = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert called and all(f"`make {name}`" in README or f"make {name}\n" in README for name in called)


def test_the_pipeline_snippet_runs(capsys, tmp_path, monkeypatch):
    snippet = next(block for block in blocks("python") if "open_pipeline" in block)
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").symlink_to(clips.real("bikes"))
    Path("bundles").mkdir()
    Path("bundles/ov7b").symlink_to(demo_bundle())
    exec(compile(snippet, "README.md", "exec"), {})  # the code is ours
    assert capsys.readouterr().out.strip(), "the demo says something"


def test_the_snippets_on_a_live_model_run(tmp_path, monkeypatch):
    first, second = (block for block in blocks("python") if "earlytom(model" in block)
    monkeypatch.chdir(tmp_path)
    Path("bundles").mkdir()
    Path("bundles/ov7b").symlink_to(golden_bundle("fp32").path)
    names = {"model": load_stand_in(TINY)}
    exec(compile(first, "README.md", "exec"), names)
    assert names["model"].generate.func.__self__.config.retain == 0.2
    exec(compile(second, "README.md", "exec"), names)
    assert names["model"].generate.func.__self__.encoder.path == "bundles/ov7b"
    names["restore"](names["model"])


def test_the_export_snippet_is_taken(monkeypatch):
    snippet = next(block for block in blocks("python") if "ExportOptions" in block)
    asked = []
    monkeypatch.setattr("export.export", asked.append)
    exec(compile(snippet, "README.md", "exec"), {})
    (options,) = asked
    assert options == settings.ExportOptions(retain=0.2, dtype="fp16", output="bundles/demo-fp16")


def test_options_of_the_table_exist_with_their_defaults():
    parser = export_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"`(--[a-z-]+)`", README))
    others = {
        option for made in (infer_parser(), calibrate_parser()) for action in made._actions
        for option in action.option_strings
    }
    assert named and named <= known | others


def test_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
