"""Rows of an evaluation: what each keeps, that shared work changes nothing, and what a report says of the answers."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import earlytom
from earlytom import EarlyTomConfig, InnerMerging, reference
from earlytom.demo.evaluate import Row, answer, evaluate, frames_of
from earlytom.demo.methods import (
    METHODS,
    adaptive_tower,
    calibrated_budgets,
    control,
    kept,
    make_rows,
    released_counts,
    static_tower,
)
from earlytom.demo.plot import plot
from earlytom.demo.questions import Question
from earlytom.demo.remember import RememberingVision
from earlytom.demo.report import Given, Report, RowReport, right
from earlytom.demo.suite import Suite, make_suite
from earlytom.demo.table import markdown
from earlytom.demo.world import make_clip
from earlytom.errors import CheckpointError, ConfigError, InputError
from earlytom.language.prompt import build_prompt
from earlytom.presets import preset
from tests.shared import small_demo

FRAMES = 8

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def model() -> Any:
    return earlytom.load(small_demo())


@cache
def clip(index: int, frames: int = FRAMES) -> Tensor:
    return torch.from_numpy(frames_of(make_clip("validation", 0, index, frames=frames), 196))


def settings(retain: float = 0.25, frames: int = FRAMES) -> EarlyTomConfig:
    return preset("videomme", retain, depth=2, llm_layers=7, frames=frames)


def test_rows_are_the_methods_at_each_ratio_with_and_without_inner_merging() -> None:
    rows = make_rows(model(), retain=(0.25, 0.1), inner="both", frames=FRAMES, calibration=[clip(0)])
    names = [row.name for row in rows]
    assert names[:4] == ["full", "full inner", "released r=0.25", "released r=0.25 inner"]
    assert len(set(names)) == len(names) == 2 + 3 * 4 + 3 * 2
    assert {row.method for row in rows} == set(METHODS)
    assert {row.inner for row in rows} == {None, InnerMerging(4, 0.5)}
    assert not any(row.inner for row in rows if row.method in ("uniform", "random", "first"))
    static = next(row for row in rows if row.name == "static r=0.1")
    assert static.budgets == settings(0.1).frame_budgets
    on = make_rows(model(), methods=("full", "random"), retain=(0.1,), inner="on", frames=FRAMES)
    assert [row.name for row in on] == ["full inner", "random r=0.1 inner"]


def test_every_row_gives_its_tokens_and_controls_as_many_as_static() -> None:
    rows = make_rows(model(), retain=(0.25, 0.1), frames=FRAMES, calibration=[clip(0), clip(1)])
    with torch.inference_mode():
        outputs = {row.name: row.tower(clip(2)) for row in rows}
        tokens = {row.name: row.choose(outputs[row.name], 2) if row.choose else outputs[row.name] for row in rows}
        torch.testing.assert_close(tokens["full"], model().vision.encode_all(clip(2)))
        for ratio, count in ((0.25, 2 * 49), (0.1, 2 * 20)):  # 2 frames left, round(r * 8 * 49 / 2) patches of each
            config = settings(ratio)
            plain = earlytom.StaticTower(model().vision, config)
            torch.testing.assert_close(tokens[f"static r={ratio}"], plain(clip(2)[None]).tokens[0])
            released = earlytom.AdaptiveTower(model().vision, config).encode(clip(2)).tokens
            torch.testing.assert_close(tokens[f"released r={ratio}"], released)
            for method in ("uniform", "random", "first"):
                assert len(tokens[f"{method} r={ratio}"]) == len(tokens[f"static r={ratio}"]) == count + 1


@pytest.mark.parametrize("newline", ["one_token", "no_token", "grid"])
def test_controls_keep_exactly_their_count_and_what_they_say(newline: str) -> None:
    frames, patches, newlines = 8, 49, {"one_token": 1, "no_token": 0, "grid": None}[newline]
    vision: Any = SimpleNamespace(
        newline=newline, image_newline=torch.tensor([-1.0]), pooling="bilinear", geometry=SimpleNamespace(grid=14)
    )
    features = torch.arange(frames * patches, dtype=torch.float32).view(frames, patches, 1)

    def chosen(method: str, count: int, index: int = 0, seed: int = 0) -> list[int]:
        tokens = control(method, vision, count, seed)(features, index)[:, 0].tolist()
        found = [int(token) for token in tokens if token >= 0]
        assert len(found) == count and found == sorted(set(found))
        assert newlines is None or len(tokens) == count + newlines
        return found

    for count in (1, 49, 98, 100, 391, 392):
        assert chosen("first", count) == list(range(count))
        assert len(chosen("random", count)) == len(chosen("uniform", count))
    assert chosen("uniform", 98) == [*range(2 * 49, 3 * 49), *range(6 * 49, 7 * 49)]
    assert chosen("uniform", 60) == [*range(2 * 49, 3 * 49), *range(6 * 49, 6 * 49 + 11)]
    assert chosen("random", 60) == chosen("random", 60) != chosen("random", 60, index=1)
    assert chosen("random", 60) != chosen("random", 60, seed=1)
    every = kept(vision, features, slice(None))[:, 0].tolist()
    assert [token for token in every if token >= 0] == list(range(392))
    if newline == "grid":
        assert every[:8] == [*range(7), -1]


def test_towers_that_share_layers_give_what_they_give_alone() -> None:
    vision = RememberingVision(model().vision)
    for config in (settings(0.25), settings(0.15)):
        tower, alone = adaptive_tower(vision, config), earlytom.AdaptiveTower(model().vision, config)
        fixed, own = static_tower(vision, config), earlytom.StaticTower(model().vision, config)
        with torch.inference_mode():
            for index in (0, 1, 0):
                torch.testing.assert_close(tower(clip(index)), alone.encode(clip(index)).tokens, rtol=0, atol=0)
                torch.testing.assert_close(fixed(clip(index)), own(clip(index)[None]).tokens[0], rtol=0, atol=0)
                assert fixed.saved > 0  # the layer before the first merge


def test_budgets_are_the_median_of_what_the_released_rules_leave() -> None:
    configs, clips = [settings(0.25), settings(0.1)], [clip(index) for index in range(3)]
    counts = [[released_counts(model().vision, config, frames) for frames in clips] for config in configs]
    for config, found in zip(configs, counts):
        for frames, count in zip(clips, found):
            assert list(count) == reference.frame_counts(
                model(), frames, **config.segmenting, merge_layers=config.merge_layers
            )
    budgets = calibrated_budgets(model().vision, configs, clips)
    for config, found in zip(configs, counts):
        least = int(np.ceil(config.retain * FRAMES))
        assert budgets[config.retain] == tuple(max(least, round(np.median(layer))) for layer in zip(*found))
        config.replace(frame_budgets=budgets[config.retain])  # valid
    with pytest.raises(ConfigError, match="at least one clip"):
        calibrated_budgets(model().vision, configs, [])


def test_answers_are_those_of_generate_with_and_without_a_shared_prefix() -> None:
    asked = max(make_suite(24, frames=FRAMES).asked, key=lambda asked: len(asked.questions))
    assert len(asked.questions) > 2
    tokens = model().vision.encode_all(clip(0)).detach()
    for inner in (None, InnerMerging(4, 0.5)):
        for question, given in zip(asked.questions, answer(model(), tokens, asked.questions, inner, 6)):
            ids = earlytom.generate(
                model(), build_prompt(model().tokenizer, question.prompt), tokens, inner=inner, max_new_tokens=6
            )
            assert given.ids == tuple(ids.tolist())
            assert given.text == model().tokenizer.decode(ids, skip_special_tokens=True)


def test_any_function_is_a_row_and_a_report_is_the_same_twice() -> None:
    suite = make_suite(8, frames=4)
    calls = []

    def tower(frames: Tensor) -> Tensor:
        calls.append(frames.shape)
        return model().vision.encode_all(frames)

    rows = [Row("mine", tower), Row("half", tower, choose=lambda tokens, index: tokens[: 10 + index]),
            *make_rows(model(), methods=("full", "random"), retain=(0.1,), frames=4)]
    told: list[int] = []
    report = evaluate(model(), suite, rows, lambda asked, answers: told.append(asked.index), max_new_tokens=3)
    assert calls == [(4, 196, 196, 3)] * len(suite.asked)  # once for both
    assert told == [asked.index for asked in suite.asked]
    assert report.row("mine").given == report.row("full").given and report.row("mine").tokens == 4 * 49 + 1
    assert report.row("half").tokens == 10 + sum(told) / len(told)
    again = evaluate(model(), suite, rows, max_new_tokens=3)
    assert [replace(row, seconds=0.0) for row in again.rows] == [replace(row, seconds=0.0) for row in report.rows]
    with pytest.raises(InputError, match="name of its own"):
        evaluate(model(), suite, [rows[0], rows[0]])
    with pytest.raises(CheckpointError, match="language model"):
        evaluate(earlytom.load(small_demo(), parts=("vision",)), suite, rows)


def test_answers_are_right_word_for_word() -> None:
    question = Question("where", "Where is the star?", "Top left")
    assert right("Top left", question) and right(" top LEFT\n", question)
    assert not right("Top left.", question) and not right("Left", question) and not right("", question)


def a_report(suite: Suite, **rights: list[bool]) -> Report:
    def row(name: str, answers: list[bool]) -> RowReport:
        method, _, rest = name.partition("_")
        inner = InnerMerging(4) if "inner" in rest else None
        retain = None if method == "full" else 0.1
        given = tuple(Given("Red", (1, 2), right) for right in answers)
        return RowReport(name, method, retain, inner, (), 100.0, 0.5, given)

    return Report(suite, tuple(row(name, answers) for name, answers in rights.items()))


def test_a_report_counts_compares_and_prints() -> None:
    suite = make_suite(16, frames=8)
    good, bad = [True] * 16, [question.kind != "brief" for question in suite.questions]
    names = ("full", "full_inner", "released", "released_inner", "static", "static_inner", "random", "engine_inner")
    report = a_report(suite, **{name: bad if name.startswith("static") else good for name in names})
    static, released = report.row("static"), report.row("released")
    assert report.accuracy(static).right == 14 and report.accuracy(static, "brief").right == 0
    assert report.accuracy(static, "brief").total == 2
    lost = report.difference(static, released)
    assert (lost.gained, lost.lost, lost.value) == (0, 2, -2 / 16)
    assert report.difference(static, released, "brief").value == -1
    assert report.difference(static, released, "count").value == 0
    compared = {(one.name, other.name) for one, other in report.comparisons()}
    assert compared == {
        ("static", "released"), ("static_inner", "released_inner"), ("released", "random"), ("released", "full"),
        ("released_inner", "full_inner"), ("static", "full"), ("static_inner", "full_inner"), ("random", "full"),
        ("engine_inner", "static_inner"), ("engine_inner", "full_inner"), ("full_inner", "full"),
        ("released_inner", "released"), ("static_inner", "static"),
    }
    text = markdown(report)
    assert "87.5 [64–97]" in text and "static − released" in text and "-12.5" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("| static")}) == 2  # two straight tables
    content = json.loads(json.dumps(report.to_dict()))
    assert content["rows"][4]["accuracy"]["brief"]["right"] == 0 and len(content["questions"]) == 16
    assert content["rows"][1]["inner"] == {"layer": 4, "ratio": 0.5, "method": "attention", "as_released": False}
    assert len(content["differences"]) == len(compared)


def test_a_plot_is_the_same_file_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: pip install earlytom-export[plot]")
    answers = [True, False] * 8
    report = a_report(make_suite(16, frames=8), full=answers, released=answers, released_inner=answers, random=answers)
    for name in ("a.svg", "b.svg", "c.png"):
        plot(report, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<svg" in (tmp_path / "a.svg").read_text() and (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "said"), [({"methods": ("full", "best")}, "best"), ({"inner": "maybe"}, "on, off or both")]
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_rows(model(), **changes)
