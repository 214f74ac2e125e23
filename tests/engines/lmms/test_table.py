"""lmms-eval's result files to the paper's table; the files are one that lmms-eval 0.7.3 wrote, with other numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import InputError
from engines.eval import main
from engines.lmms.results import BENCHMARKS, read_results
from engines.lmms.table import baseline_of, markdown, share_of

WRITTEN = json.loads((Path(__file__).parents[2] / "data" / "lmms_eval_results.json").read_text())
MVBENCH = [f"mvbench_{index}" for index in range(20)]


def written(path: Path, arguments: str, scores: dict[str, tuple[str, float]], **config: Any) -> Path:
    """A result file: task -> its metric and what lmms-eval says of it."""
    content = copy.deepcopy(WRITTEN)
    own = content["results"].pop("earlytom_clips")
    counts = content["n-samples"].pop("earlytom_clips")
    for task, (metric, value) in scores.items():
        content["results"][task] = {name.replace("score", metric, 1): number for name, number in own.items()}
        content["results"][task] |= {"alias": task, f"{metric},none": value}
        content["n-samples"][task] = counts
    content["config"] |= {"model_args": arguments} | config
    path.write_text(json.dumps(content))
    return path


def four(directory: Path, arguments: str, mvbench: float, egoschema: float, long: float, videomme: float) -> list[Path]:
    """A file for each benchmark, as scripts/eval.sh has them: fractions where lmms-eval gives fractions."""
    scores: list[dict[str, tuple[str, float]]] = [
        {"mvbench": (" ", 0)} | dict.fromkeys(MVBENCH, ("mvbench_accuracy", mvbench)),
        {"egoschema_subset": ("score", egoschema / 100)}, {"longvideobench_val_v": ("lvb_acc", long / 100)},
        {"videomme": ("videomme_perception_score", videomme)},
    ]
    name = arguments.replace("/", "-")
    return [written(directory / f"{name}-{i}_results.json", arguments, of) for i, of in enumerate(scores)]


def test_the_file_that_lmms_eval_wrote_is_what_the_tests_build_on() -> None:
    assert WRITTEN["results"]["earlytom_clips"]["score,none"] == 0.2 and WRITTEN["config"]["model"] == "earlytom"


def test_a_row_for_each_model_and_its_share_of_the_unpruned(tmp_path: Path) -> None:
    files = four(tmp_path, "checkpoint=c,retain=0.1,preset=videomme,inner=as-released", 50, 60, 52, 54)
    files += four(tmp_path, "checkpoint=c,retain=0.25,inner=as-released", 58, 60, 57, 58)
    files += four(tmp_path, "checkpoint=c,retain=1", 60, 62, 58, 60)
    rows = read_results([tmp_path])
    assert [row.name for row in rows] == ["unpruned", "retain 0.25, inner as released", "retain 0.1, inner as released"]
    assert rows == read_results(files[::-1]), "the order of files changes nothing"
    assert [rows[2].scores[b.title].value for b in BENCHMARKS] == pytest.approx([50, 60, 52, 54])
    assert share_of(rows[2], rows) == pytest.approx(100 * 54 / 60) and share_of(rows[0], rows) == 100
    lines = markdown(rows).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    assert heads == ["visual tokens", *(b.title for b in BENCHMARKS), "average", "% of unpruned"]
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells == ["retain 0.1, inner as released", "393", "50.0", "60.0", "52.0", "54.0", "54.0", "90.0"]
    assert len(lines) == 5, "nothing to note"


def test_a_preset_for_each_benchmark_makes_one_row(tmp_path: Path) -> None:
    one = written(tmp_path / "a.json", "checkpoint=c,retain=0.2,preset=videomme",
                  {"videomme": ("videomme_perception_score", 50.0)})
    other = written(tmp_path / "b.json", "checkpoint=c,retain=0.2,preset=egoschema",
                    {"egoschema_subset": ("score", 0.5)})
    (row,) = read_results([one, other])
    assert set(row.scores) == {"VideoMME", "EgoSchema"}
    with pytest.raises(InputError, match=r"VideoMME of retain 0\.2 is in two files, .*a\.json and .*c\.json: give one"):
        read_results([one, written(tmp_path / "c.json", "checkpoint=c,retain=0.2",
                                   {"videomme": ("videomme_perception_score", 51.0)})])


def test_what_is_not_the_whole_benchmark_is_marked(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", "bundle=b/ov7b", {"mvbench_1": ("mvbench_accuracy", 40.0)})
    content = json.loads(path.read_text())
    content["n-samples"]["mvbench_1"] = {"original": 200, "effective": 8.0}
    path.write_text(json.dumps(content))
    text = markdown(read_results([path]))
    assert "bundle ov7b" in text and "40.0*" in text
    assert "* MVBench: 8 of 200 questions of mvbench_1, 1 of its 20 tasks" in text
    assert "no row is of the unpruned model" in text


def test_the_average_is_over_the_same_benchmarks_or_none(tmp_path: Path) -> None:
    four(tmp_path, "checkpoint=c,retain=1", 60, 62, 58, 60)
    written(tmp_path / "x_results.json", "checkpoint=c,retain=0.1", {"videomme": ("videomme_perception_score", 54.0)})
    rows = read_results([tmp_path])
    assert share_of(rows[1], rows) is None
    cells = [cell.strip() for cell in markdown(rows).splitlines()[3].split("|")[3:-1]]
    assert cells == ["—", "—", "—", "54.0", "—", "—"]


def test_each_checkpoint_is_measured_by_its_own(tmp_path: Path) -> None:
    for checkpoint, base in (("c", 60), ("d", 40)):
        four(tmp_path, f"checkpoint={checkpoint},retain=1", base, base, base, base)
        four(tmp_path, f"checkpoint={checkpoint},retain=0.2", 30, 30, 30, 30)
    four(tmp_path, "bundle=x", 30, 30, 30, 30)
    rows = {(row.name, row.checkpoint): row for row in read_results([tmp_path])}
    found = {key: share_of(row, list(rows.values())) for key, row in rows.items()}
    assert found[("retain 0.2", "c")] == pytest.approx(50) and found[("retain 0.2", "d")] == pytest.approx(75)
    assert found[("bundle x", "")] is None, "whose weights a bundle has, its file does not say"
    assert "retain 0.2 (d)" in markdown(list(rows.values()))
    only = [row for row in rows.values() if row.checkpoint != "d"]
    assert baseline_of(rows[("bundle x", "")], only) is rows[("unpruned", "c")]


def test_another_model_of_lmms_eval_is_a_row_too(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", "pretrained=p,conv_template=qwen_1_5",
                   {"videomme": ("videomme_perception_score", 58.6)}, model="llava_onevision")
    assert [row.name for row in read_results([path])] == ["llava_onevision"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("not JSON", "cannot be read: it is not JSON"),
        ("[]", "is no result file of lmms-eval"),
        (json.dumps({"results": {}}), "is no result file of lmms-eval"),
        (json.dumps(WRITTEN), "holds no benchmark of the table: its tasks are earlytom_clips"),
        (json.dumps(WRITTEN).replace("earlytom_clips", "videomme"), "has no videomme_perception_score of videomme"),
        (json.dumps(WRITTEN).replace("earlytom_clips", "egoschema_subset").replace("bundle=bundles/demo", "retain=1"),
         "has model_args 'retain=1': give bundle=DIR"),
    ],
)
def test_other_files_are_refused_in_a_sentence(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert main(["--table", str(path)]) == 1
    said = capsys.readouterr()
    assert told in said.err and len(said.err.splitlines()) == 1 and not said.out


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four(tmp_path, "checkpoint=c,retain=1", 60, 62, 58, 60)
    assert main(["--table", str(tmp_path)]) == 0
    assert "| unpruned |" in capsys.readouterr().out
    assert main(["--table", str(tmp_path / "missing")]) == 1
    (tmp_path / "empty").mkdir()
    assert main(["--table", str(tmp_path / "empty")]) == 1
    assert "no result of lmms-eval lies in the directory" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [["--questions", "3"], ["--suite", "demo"], ["--checkpoint", "demo"]])
def test_the_table_stands_alone(beside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--table", str(tmp_path), *beside])
    assert stopped.value.code == 2 and "--table" in capsys.readouterr().err
