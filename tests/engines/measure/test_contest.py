"""What `earlytom-bench` times is what it says it is: each contestant's answers are those of the code it stands for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from earlytom import encode_video, generate, load
from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError, EngineError
from earlytom.reference import frame_counts
from earlytom.tower import StaticTower
from engines.measure import contest
from engines.measure.contest import hold_contest
from engines.measure.contestants import Subject, open_contestant
from engines.measure.released import ReleasedTower
from engines.measure.results import Row
from engines.measure.settings import ADAPTIVE, COMPILED, EAGER, RELEASED, SDPA, STATIC, Settings
from engines.measure.stopwatch import Stopwatch
from tests.cases import TINY, cases, small_clip, small_config, small_vision

FRAMES, NEW = 3, 3
CONFIG = EarlyTomConfig(
    retain=0.2, frames=FRAMES, merge_layers=(1, 3, 4), frame_budgets=(3, 2, 2), tau=0.5, inner=InnerMerging(3, 0.5)
)
SEGMENTING: dict[str, Any] = {"tau": 0.5, "max_window": 6, "ema": 0.9}


@pytest.fixture(scope="module")
def model() -> Any:
    return load(TINY)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return list(cases("e2e/e2e")[0].meta["prompt"])


@pytest.fixture(scope="module")
def clip(golden: Any) -> torch.Tensor:
    """Frames of the golden clip, uint8 [T, 384, 384, 3]."""
    with np.load(golden / "e2e" / "frames.npz") as archive:
        return torch.from_numpy(archive["video"][:: 32 // FRAMES][:FRAMES])


@pytest.fixture(scope="module")
def subject(model: Any, prompt: list[int]) -> Subject:
    return Subject(
        CONFIG, model.geometry, torch.device("cpu"), model.vision, model.language, prompt=tuple(prompt),
    )


@pytest.fixture(scope="module")
def rows(subject: Subject, clip: torch.Tensor, one_thread: None) -> dict[str, Row]:
    settings = Settings(
        contestants=(EAGER, SDPA, RELEASED, ADAPTIVE, STATIC), runs=1, warm_up=1, new_tokens=NEW, frames=FRAMES
    )
    found, not_run = hold_contest(subject, settings, clip[None], read=lambda: {"decode": 2.0, "resize": 1.0})
    assert not not_run
    return {row.name: row for row in found}


def test_every_contestant_has_its_rows(rows: dict[str, Row]) -> None:
    ours = [name for tower in (RELEASED, ADAPTIVE, STATIC) for name in (tower, f"{tower} + inner")]
    assert list(rows) == [EAGER, SDPA, *ours, f"{STATIC}, second question"]
    for name, row in rows.items():
        assert row.inner == name.endswith("inner") and row.second_question == name.endswith("second question")
        assert all(len(span.milliseconds) == 1 and min(span.milliseconds) >= 0 for span in row.spans)
        assert row.visual_tokens + len(cases("e2e/e2e")[0].meta["prompt"]) - 1 == row.prompt_tokens
        ends = ["splice", "prefill", "first token"] + ([] if row.second_question else ["generation"])
        assert [span.name for span in row.spans][-len(ends):] == ends
        assert row.second_question or [span.name for span in row.spans][:3] == ["decode", "resize", "copy"]
        parts = [sum(span.milliseconds) for span in row.spans if span.name != "generation"]
        assert row.ttft.median == pytest.approx(sum(parts), rel=1e-6)


def test_full_tokens_are_the_unpruned_model(
    rows: dict[str, Row], model: Any, prompt: list[int], clip: torch.Tensor
) -> None:
    tokens = model.vision.encode_all(clip)
    expected = generate(model, prompt, tokens, max_new_tokens=NEW, min_new_tokens=NEW).tolist()
    assert list(rows[EAGER].ids) == list(rows[SDPA].ids) == expected
    assert rows[EAGER].visual_tokens == rows[SDPA].visual_tokens == FRAMES * 196 + 1 == len(tokens)


@pytest.mark.parametrize("name", [RELEASED, ADAPTIVE, STATIC])
def test_answers_are_those_of_the_tower_and_of_inner_merging(
    name: str, rows: dict[str, Row], model: Any, prompt: list[int], clip: torch.Tensor
) -> None:
    if name == STATIC:
        tokens = StaticTower(model.vision, CONFIG)(clip[None]).tokens[0]
    else:
        tokens = encode_video(
            model, clip, retain_ratio=CONFIG.retain, merge_layers=CONFIG.merge_layers, **SEGMENTING
        )
    for row, inner in ((rows[name], None), (rows[f"{name} + inner"], CONFIG.inner)):
        expected = generate(model, prompt, tokens, inner=inner, max_new_tokens=NEW, min_new_tokens=NEW)
        assert list(row.ids) == expected.tolist() and row.visual_tokens == len(tokens)


def test_a_second_question_is_answered_from_the_prefix(rows: dict[str, Row]) -> None:
    assert rows[f"{STATIC}, second question"].ids == rows[STATIC].ids[:1]
    assert not [span for span in rows[f"{STATIC}, second question"].spans if span.name.startswith("vision")]


def test_vision_is_divided_at_the_merge_layers(rows: dict[str, Row]) -> None:
    def stages(name: str) -> list[str]:
        return [s.name.removeprefix("vision: ") for s in rows[name].spans if s.name.startswith("vision")]

    merging = ["patches", "layers 0-1", "merge 1", "layers 2-3", "merge 3", "layers 4-4", "merge 4", "layers 5-5",
               "projector and selection"]
    assert stages(RELEASED) == stages(ADAPTIVE) == stages(STATIC) == merging
    assert stages(SDPA) == [name for name in merging[:-1] if "merge" not in name] + ["projector and pooling"]


def test_costs_are_counted(rows: dict[str, Row]) -> None:
    assert (rows[SDPA].vision_flops or 0) > (rows[STATIC].vision_flops or 0) > 0
    assert (rows[STATIC].prefill_flops or 0) > (rows[f"{STATIC} + inner"].prefill_flops or 0) > 0
    assert rows[STATIC].frames == CONFIG.frame_budgets and rows[SDPA].frames == ()


def test_nothing_stays_on_the_model(rows: dict[str, Row], model: Any) -> None:
    modules = [*model.vision.modules(), *model.language.modules()]
    assert not [m for m in modules if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("newline", ["one_token", "grid", "no_token"])
@pytest.mark.parametrize("seed", range(3))
def test_the_released_tower_gives_the_oracles_tokens(newline: str, seed: int) -> None:
    vision, config = small_vision(newline=newline, seed=seed), small_config(newline=newline)
    (clip,) = small_clip(12, seed=seed)
    settings = {"merge_layers": config.merge_layers, **config.segmenting}
    marks: list[str] = []
    tokens, counts = ReleasedTower(vision, config).encode(clip, marks.append)
    torch.testing.assert_close(tokens, encode_video(vision, clip, retain_ratio=config.retain, **settings))
    assert list(counts) == frame_counts(vision, clip, **settings)
    assert [mark.removeprefix("vision: ") for mark in marks] == [
        "patches", "layers 0-0", "merge 0", "layers 1-1", "merge 1", "layers 2-3", "merge 3", "projector and selection"
    ]


def small_subject(**changes: Any) -> Subject:
    vision = small_vision()
    return Subject(small_config(), vision.geometry, torch.device("cpu"), vision, **changes)


def test_a_compiled_tower_is_the_static_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda tower: lambda clip: called.append(1) or tower(clip))
    subject, watch, clip = small_subject(), Stopwatch("cpu"), small_clip(12)
    with ExitStack() as stack, torch.inference_mode():
        tower = open_contestant(COMPILED, subject, stack)
        watch.start()
        ((tokens,), left) = tower.encode(clip, watch)  # type: ignore[union-attr]
    assert subject.vision is not None
    torch.testing.assert_close(tokens, StaticTower(subject.vision, subject.config)(clip).tokens[0])
    assert left == subject.config.frame_budgets and list(watch.milliseconds()) == ["copy", "vision"]
    assert len(called) == 2, "the first call compiles, and is not measured"


@pytest.mark.slow
def test_a_compiler_takes_the_tower() -> None:
    subject, watch, clip = small_subject(), Stopwatch("cpu"), small_clip(12)
    with ExitStack() as stack, torch.inference_mode():
        tower = open_contestant(COMPILED, subject, stack)
        ((tokens,), _) = tower.encode(clip, watch)  # type: ignore[union-attr]
    assert subject.vision is not None
    expected = StaticTower(subject.vision, subject.config)(clip).tokens[0]
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)  # fused sums run in another order


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_who_cannot_take_part_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(contestants=(STATIC, COMPILED, RELEASED), vision_only=True, runs=2, warm_up=0)
    broken = failing(RuntimeError("no C++ compiler\nat all"))
    monkeypatch.setattr(torch, "compile", lambda tower: broken)  # it compiles, and fails, when it is first called
    monkeypatch.setattr(ReleasedTower, "encode", failing(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    said: list[str] = []
    rows, not_run = hold_contest(small_subject(), settings, small_clip(12), tell=said.append)
    assert [row.name for row in rows] == [STATIC] and {entry.name for entry in not_run} == {COMPILED, RELEASED}
    why = {entry.name: entry.why for entry in not_run}
    assert why[COMPILED] == "torch.compile does not work here: no C++ compiler"
    assert why[RELEASED] == "it failed: DefaultCPUAllocator: can't allocate memory"
    assert any(line.startswith("compiled: not run") for line in said)
    with pytest.raises(EngineError, match="nothing could be measured: compiled: "):
        hold_contest(small_subject(), Settings(contestants=(COMPILED,), vision_only=True), small_clip(12))


def test_an_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReleasedTower, "encode", failing(RuntimeError("shapes do not fit")))
    settings = Settings(contestants=(RELEASED,), vision_only=True, runs=1, warm_up=0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        hold_contest(small_subject(), settings, small_clip(12))


def test_inner_merging_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(ConfigError, match="--inner off"):
        hold_contest(small_subject(), Settings(contestants=(STATIC,), inner="on"), small_clip(12))


def test_rounds_alternate_and_memory_is_measured_before_they_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, bool]] = []
    run = contest.Course.run

    def noted(self: Any, name: str, *, remember: bool = False) -> Any:
        order.append((name, remember))
        return run(self, name, remember=remember)

    monkeypatch.setattr(contest.Course, "run", noted)
    settings = Settings(contestants=(STATIC, ADAPTIVE), vision_only=True, runs=2, warm_up=2)
    rows, _ = hold_contest(small_subject(), settings, small_clip(12))
    assert [name for name, _ in order] == [ADAPTIVE, STATIC, STATIC, ADAPTIVE] * 2
    assert [remember for _, remember in order] == [False] * 2 + [True] * 2 + [False] * 4
    assert all(len(span.milliseconds) == 2 for row in rows for span in row.spans)
