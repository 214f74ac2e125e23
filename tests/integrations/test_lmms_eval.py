"""lmms-eval itself runs a small local task with the demo: from the wheel, in an environment of its own, offline.

Its answers are those of our pipeline asked directly, whatever the form, the batch and the number of processes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from engines.lmms.results import BENCHMARKS
from tests.integrations.test_wheel import call
from tests.integrations.test_wheel import wheel as wheel
from tests.test_layout import ROOT

pytestmark = pytest.mark.integration

TASK = "earlytom_clips"
FRAMES, PATCHES = 8, 196
QUESTIONS = [  # of the clips 1 and 7: an uneven number, so that one of two processes is given padding
    (1, "What colour is the star: red, white, green or orange?", "Green"),
    (1, "Which shape comes first: cross, diamond, circle or star?", "Star"),
    (1, "What happens in this video?", ""),
    (7, "How many things are there: four, two, one or three?", "Four"),
    (7, "What way does the green circle move: right, up, down or left?", "Left"),
]
YAML = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["video"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    return {"score": float(results[0] == doc["answer"])}
"""
DIRECTLY = """
import json, sys
import engines
from earlytom.language.prompt import build_prompt

bundle, data = sys.argv[1:]
with engines.open_pipeline(bundle, engine="onnxruntime") as pipeline:
    for line in open(data):
        document = json.loads(line)
        encoded = pipeline.encode(document["video"])
        answer = pipeline.ask(encoded, document["question"], max_new_tokens=8)
        prompt = build_prompt(pipeline.model.tokenizer, document["question"])
        tokens = [{"input_tokens": len(prompt) - 1 + len(encoded.tokens), "output_tokens": len(answer.ids)}]
        print(json.dumps([answer.text.strip(), tokens, len(encoded.tokens)]))
"""
TASKS = """
import importlib, json, sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

manager, found = TaskManager(), []
for benchmark in json.loads(sys.argv[1]):
    one = benchmark["parts"] == 1
    names = [n for n in manager.all_subtasks if (n == benchmark["task"] if one else n.startswith(benchmark["task"]))]
    for name in names:
        config = load_yaml_config(manager.task_index[name]["yaml_path"], mode="full")
        found.append([benchmark["title"], name, config["output_type"] if "output_type" in config else "generate_until",
                      [metric["metric"] for metric in config["metric_list"]]])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Place:
    """bin: of the environment; home: a directory with the bundle, the data and the task."""

    bin: Path
    home: Path

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.home), "HF_HOME": str(self.home / "hub"),
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        }

    def run(self, command: list[str], output: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run lmms-eval on the task: its results, and its samples in the order of the documents."""
        call(*command, "--tasks", TASK, "--include_path", "task", "--log_samples", "--output_path", output,
             cwd=self.home, environ=self.environ)
        (results,) = (self.home / output).rglob("*_results.json")
        (samples,) = (self.home / output).rglob("*_samples_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        return json.loads(results.read_text()), sorted(lines, key=lambda line: int(line["doc_id"]))


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("lmms")
    call(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, home / "venv", cwd=home)
    call(
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", home / "venv/bin/python",
        "-c", ROOT / "constraints-eval.txt", f"earlytom-export[eval] @ {wheel.as_uri()}", cwd=home,
    )
    made = Place(home / "venv/bin", home)
    for index in (1, 7):
        call("earlytom-clip", f"clip{index}.mp4", "--index", str(index), "--frames", "16", cwd=home,
             environ=made.environ)
    call("earlytom-export", "--frames", str(FRAMES), "--retain", "0.25", "--engine", "onnxruntime", "--no-verify",
         "--quiet", "--output", "bundle", cwd=home, environ=made.environ)
    data = home / "clips.jsonl"
    data.write_text("".join(
        json.dumps({"video": str(home / f"clip{index}.mp4"), "question": question, "answer": answer}) + "\n"
        for index, question, answer in QUESTIONS
    ))
    (home / "task").mkdir()
    (home / "task" / "clips.yaml").write_text(YAML.format(task=TASK, data=data))
    (home / "task" / "utils.py").write_text(UTILS)
    return made


@pytest.fixture(scope="module")
def expected(place: Place) -> list[Any]:
    """Text, token counts and visual tokens of each question, by our pipeline alone."""
    said = call("python", "-c", DIRECTLY, "bundle", "clips.jsonl", cwd=place.home, environ=place.environ)
    return [json.loads(line) for line in said.splitlines()]


@pytest.fixture(scope="module")
def documented(place: Place) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the command of docs/evaluation.md gives, with this bundle and this task: chat form, one process."""
    lines = (ROOT / "docs/evaluation.md").read_text().splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("lmms-eval ")).replace("bundles/ov7b", "bundle"))
    for option in ("--tasks", "--output_path"):
        at = words.index(option)
        del words[at : at + 2]
    return place.run(words, "one")


def test_answers_and_token_counts_are_the_pipelines_own(
    expected: list[Any], documented: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    results, samples = documented
    assert results["config"]["model_backend"] == "engines.lmms.model.EarlyTomChat (chat)"
    assert [[sample["filtered_resps"], sample["token_counts"]] for sample in samples] == [
        [text, tokens] for text, tokens, _ in expected
    ]
    assert all(text for text, *_ in expected)
    assert results["throughput"]["avg_visual_tokens"] == sum(visual for *_, visual in expected) / len(expected)
    assert results["throughput"]["total_gen_tokens"] == sum(tokens[0]["output_tokens"] for _, tokens, _ in expected)
    right = [text == answer for (text, *_), (*_, answer) in zip(expected, QUESTIONS)]
    assert results["results"][TASK]["score,none"] == pytest.approx(sum(right) / len(right))


def test_two_processes_batches_and_the_simple_form_answer_alike(
    place: Place, documented: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "-m", "lmms_eval"]
    results, samples = place.run(
        [*launch, "--model", "earlytom", "--model_args", "bundle=bundle", "--batch_size", "2", "--force_simple"], "two"
    )
    before, alone = documented
    assert results["config"]["model_backend"] == "engines.lmms.model.EarlyTom (simple)"
    assert results["results"] == before["results"]
    for name in ("doc_id", "filtered_resps", "token_counts", "score"):
        assert [sample[name] for sample in samples] == [sample[name] for sample in alone], name


def test_the_table_is_made_from_these_files(
    place: Place, documented: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    """The unpruned checkpoint and the bundle, the task under the name of a benchmark with the same metric."""
    arguments = f"checkpoint=demo,retain=1,frames={FRAMES}"
    results, _ = place.run(["lmms-eval", "--model", "earlytom", "--model_args", arguments], "unpruned")
    assert results["throughput"]["avg_visual_tokens"] == FRAMES * PATCHES + 1
    for name, content in (("a", documented[0]), ("b", results)):
        text = json.dumps(content).replace(TASK, "egoschema_subset")
        (place.home / f"{name}_results.json").write_text(text)
    said = call("earlytom-eval", "--table", "a_results.json", "b_results.json", cwd=place.home, environ=place.environ)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    scores = [100 * content["results"][TASK]["score,none"] for content in (documented[0], results)]
    assert rows[0] == ["", "visual tokens", "EgoSchema", "average", "% of unpruned"]
    by_name = {row[0]: row for row in rows[2:]}
    assert by_name["bundle bundle"][1:3] == ["393", f"{scores[0]:.1f}"]
    assert by_name[f"unpruned, {FRAMES} frames"][1:3] == [str(FRAMES * PATCHES + 1), f"{scores[1]:.1f}"]


def test_wrong_arguments_end_it_with_one_sentence(place: Place) -> None:
    command = ["lmms-eval", "--model", "earlytom", "--model_args", "bundle=nowhere", "--tasks", TASK,
               "--include_path", "task"]
    done = subprocess.run(command, cwd=place.home, env=place.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if "earlytom" in line and "error" in line]
    assert said == [f"lmms-eval --model earlytom: error: {place.home / 'nowhere'} does not exist"]


def test_the_benchmarks_of_the_table_are_tasks_here(place: Place) -> None:
    """Their code imports, decord included, and they have the metrics that the table reads."""
    wanted = json.dumps([asdict(benchmark) for benchmark in BENCHMARKS])
    said = call("python", "-c", TASKS, wanted, cwd=place.home, environ=place.environ)
    found = json.loads(said.splitlines()[-1])
    for benchmark in BENCHMARKS:
        own = [entry for entry in found if entry[0] == benchmark.title]
        assert len(own) == benchmark.parts
        assert all(kind == "generate_until" and benchmark.metric in metrics for _, _, kind, metrics in own)
