"""Results survive their file, tables say what was measured, and two measurements are compared by the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.errors import ConfigError, InputError
from engines.measure.compare import compare, comparison_markdown
from engines.measure.picture import draw_results
from engines.measure.results import NotRun, Results, Row, Span, speedup
from engines.measure.settings import CONTESTANTS, SDPA, STATIC, Settings
from engines.measure.tables import markdown


def a_row(name: str, times: dict[str, list[float]], **rest: Any) -> Row:
    return Row(name, name, f"what {name} is", tuple(Span(span, tuple(ms)) for span, ms in times.items()), **rest)


def some_results(**changes: Any) -> Results:
    full = a_row(
        SDPA, {"copy": [1, 1, 1], "vision: patches": [9, 9, 9], "vision: layers 0-1": [90, 190, 90],
               "splice": [1, 1, 1], "prefill": [99, 99, 199], "first token": [0, 0, 0], "generation": [30, 20, 30]},
        visual_tokens=6273, ids=(1, 2, 3), vision_flops=1000, prefill_flops=400, memory_bytes=2**30,
    )
    static = a_row(
        STATIC, {"copy": [1, 1, 1], "vision: patches": [9, 9, 9], "vision: layers 0-1": [20, 40, 10],
                 "vision: merge 1": [10, 10, 20], "splice": [1, 1, 1], "prefill": [9, 19, 9], "first token": [0, 0, 0],
                 "generation": [20, 20, 20]},
        visual_tokens=1254, ids=(1, 2, 3), vision_flops=250, prefill_flops=20, frames=(20, 8),
    )
    again = a_row(f"{STATIC}, second question", {"splice": [1, 1, 1], "prefill": [3, 3, 3], "first token": [1, 1, 1]},
                  second_question=True, ids=(1,))
    machine = {"processor": "a CPU", "threads": 2, "versions": {"torch": "2.11", "transformers": "5.1"}}
    return replace(
        Results(Settings(runs=3), "a model", (full, static, again), (NotRun("compiled", "there is no compiler"),),
                dtype="fp32", language_dtype="fp32", attention="sdpa", machine=machine, version="0.1.0",
                commit="abc"),
        **changes,
    )


def test_times_are_sums_round_by_round() -> None:
    full, static, again = some_results().rows
    assert full.milliseconds("ttft") == (200, 300, 300) and static.milliseconds("ttft") == (50, 80, 50)
    assert full.ttft.median == 300 and static.ttft.median == 50
    assert static.milliseconds("vision") == (39, 59, 39) and static.milliseconds("decode") is None
    assert speedup(full, static, "ttft") == 4  # of 4, 3.75 and 6, not of the medians
    assert speedup(full, again, "vision") is None
    assert full.tokens_per_second is not None and full.tokens_per_second.median == pytest.approx(2000 / 30)
    assert again.tokens_per_second is None


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = some_results()
    path = tmp_path / "a.json"
    path.write_text(results.to_json())
    assert Results.read(path) == results
    content = json.loads(results.to_json())
    assert content["rows"][1]["speedup"] == 4 and content["rows"][1]["ttft"]["median_ms"] == 50
    assert content["rows"][0]["spans"][1]["median_ms"] == 9 and content["base"] == SDPA


@given(st.lists(st.floats(0, 1e6).map(lambda x: round(x, 4)), min_size=1, max_size=5), st.integers(0, 9))
def test_any_times_survive(times: list[float], tokens: int) -> None:
    row = a_row("x", {"copy": times, "generation": [t + 1 for t in times]}, ids=tuple(range(tokens)))
    results = some_results(rows=(row,))
    assert Results.from_json(results.to_json()) == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "rows": [{}]}', "null", "\x00"])
def test_what_are_no_results_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not what earlytom-bench --output writes"):
        Results.from_json(text)


def test_another_schema_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="schema 2"):
        Results.from_json('{"schema": 2}')
    with pytest.raises(InputError, match="cannot be read"):
        Results.read(tmp_path / "none.json")


def test_ratios_come_first() -> None:
    text = markdown(some_results())
    ratios, times = text.index("How many times as fast as transformers-sdpa"), text.index("Milliseconds")
    assert ratios < times
    (line,) = (line for line in text[ratios:times].splitlines() if line.startswith("| static "))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "4.00x", "2.54x", "11.00x", "1.50x", "25.0 %", "5.0 %", "1254", "20,8"
    ]
    assert "50.0 [50.0–80.0]" in text[times:] and "1024 MiB" in text and "merge 1" in text
    assert "* compiled: not run: there is no compiler" in text and "a CPU, 2 threads" in text and "(abc)" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 3, "three tables"


def test_random_weights_are_told() -> None:
    assert "Weights are random" not in markdown(some_results())
    assert "Weights are random" in markdown(some_results(settings=Settings(full_size="7b")))


def test_vision_alone_has_no_first_token() -> None:
    row = a_row(STATIC, {"copy": [1], "vision": [4]}, vision_flops=8 * 10**9)
    text = markdown(some_results(rows=(row,), settings=Settings(vision_only=True, runs=1)))
    assert "TTFT" not in text and "the tower alone" in text and "2.00 " in text and "tokens long" not in text


def test_two_measurements_are_compared() -> None:
    before = some_results()
    static = a_row(STATIC, {"copy": [1, 1, 1], "vision": [19, 19, 29], "prefill": [9, 19, 9], "generation": [9, 9, 9]})
    after = some_results(
        rows=(static, a_row("onnxruntime", {"vision": [1, 1, 1]})), commit="def",
        settings=Settings(runs=5, frames=16), machine=before.machine | {"threads": 4},
    )
    found = compare(before, after)
    changes = {change.quantity: change for change in found.changes}
    assert list(changes) == ["ttft", "vision", "prefill", "generation"]
    assert changes["vision"].speedup == 39 / 19 and changes["vision"].clear
    assert changes["prefill"].speedup == 1 and not changes["prefill"].clear
    assert changes["ttft"].speedup == 50 / 39 and changes["ttft"].clear
    assert found.differences == ("commit: abc against def", "threads: 2 against 4", "frames: 32 against 16")
    assert found.only_before == (SDPA, f"{STATIC}, second question") and found.only_after == ("onnxruntime",)
    text = comparison_markdown(found, ("a.json", "b.json"))
    assert "2.05x*" in text and "1.00x " in text and "* they differ in commit: abc against def" in text
    assert json.loads(json.dumps(found.to_dict()))["changes"][1]["speedup"] == pytest.approx(39 / 19, abs=1e-4)
    with pytest.raises(InputError, match="no row in common"):
        compare(before, some_results(rows=after.rows[1:]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"contestants": ("fastest",)}, "no contestant 'fastest'"), ({"runs": 0}, "at least 1"),
        ({"warm_up": -1}, "at least 0"), ({"inner": "maybe"}, "both, on or off"),
        ({"checkpoint": "demo", "full_size": "7b"}, "does not go with a checkpoint"),
        ({"contestants": (SDPA,), "vision_only": True}, "no part in vision alone"),
        ({"contestants": ("onnxruntime",)}, "--bundle"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**given)


def test_everybody_who_can_takes_part() -> None:
    assert Settings(bundle="b").names == tuple(CONTESTANTS)
    assert [name for name in CONTESTANTS if name not in Settings().names] == ["tensorrt", "tensorrt-rtx", "onnxruntime"]
    assert SDPA not in Settings(vision_only=True).names
    assert Settings(contestants=(STATIC, SDPA, STATIC)).names == (STATIC, SDPA)


def test_a_picture_is_the_same_file_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: pip install earlytom-export[plot]")
    for name in ("a.svg", "b.svg", "c.png"):
        draw_results(some_results(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
