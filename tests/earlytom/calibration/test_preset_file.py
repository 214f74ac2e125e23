"""Calibrated presets as files: the same after a trip, refused in one sentence when they are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from earlytom.calibration.preset_file import CalibratedPreset, Origin, read_preset
from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError

ORIGIN = Origin("some/checkpoint", "ab" * 32, 26, 120, 50.0, None)
PRESET = CalibratedPreset("mine", 0.2, 32, (8, 21, 23), (18, 11, 8), 0.5, 6, 0.9, ORIGIN)


@pytest.mark.parametrize(
    "preset",
    [PRESET, replace(PRESET, name="ärger", made_from=replace(ORIGIN, percentile=None, target_flops=2.5e12)),
     replace(PRESET, merge_layers=(3,), frame_budgets=(9,), frames=16, tau=-1.0)],
)
def test_a_preset_is_the_same_after_a_trip(preset: CalibratedPreset, tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    preset.write(path)
    assert read_preset(path) == preset and path.read_text() == preset.to_json()
    assert EarlyTomConfig(**preset.settings).frame_budgets == preset.frame_budgets
    assert [file.name for file in tmp_path.iterdir()] == ["preset.json"]


def changed(**changes: Any) -> str:
    content = json.loads(PRESET.to_json()) | changes
    return json.dumps({name: value for name, value in content.items() if value is not ...})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no preset"),
        ("{", "is no preset"),
        ("[1]", "it must be an object"),
        ('{"name": 1, "name": 2}', "a key appears twice"),
        (changed(tau=float("nan")), "NaN is no number"),
        (changed(version=2), "has version 2 and this program reads version 1: upgrade"),
        (changed(version=0), "version is 0"),
        (changed(version=True), "version is True"),
        (changed(version=...), "no version"),
        (changed(tau=...), "no tau"),
        (changed(retian=0.1), "unknown retian"),
        (changed(tau="high"), "tau is 'high', it must be a finite number"),
        (changed(tau=True), "tau is True"),
        (changed(tau=3), "tau is 3, it must lie in -1..1"),
        (changed(frames=32.0), "frames is 32.0, it must be a whole number"),
        (changed(frame_budgets="18,11,8"), "must be a list of whole numbers"),
        (changed(frame_budgets=[18, 11, 8.0]), "must be a list of whole numbers"),
        (changed(frame_budgets=[18, 20, 8]), "budgets must not grow"),
        (changed(frame_budgets=[18, 8]), "2 frame_budgets"),
        (changed(frame_budgets=[18, 8, 6]), "at least 7 frames are needed"),
        (changed(merge_layers=[8, 21, 26]), "must lie in the 26 layers"),
        (changed(merge_layers=[], frame_budgets=[], retain=1), "merge_layers are none"),
        (changed(name=3), "name is 3, it must be a text"),
        (changed(made_from=[]), "made_from is [], it must be an object"),
        (changed(made_from={"digest": "x"}), "made_from has no checkpoint"),
        ("[" * 60000, "is no preset"),
        (" " * 70000, "70000 bytes"),
    ],
)
def test_what_is_no_preset_is_refused_in_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_preset(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_preset(path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no preset"):
        read_preset(tmp_path / "bytes.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        PRESET.write(tmp_path / "no" / "preset.json")


def test_budgets_are_for_a_depth_for_frames_and_for_layers() -> None:
    PRESET.check_fits(26, {})
    PRESET.check_fits(26, {"frames": 32, "merge_layers": (8, 21, 23), "tau": 0.1, "retain": 0.1})
    PRESET.check_fits(26, {"frames": 64, "merge_layers": (1, 2), "frame_budgets": (20, 10)})
    for layers, changes, says in (
        (8, {}, r"tower of 26 layers \(some/checkpoint\), the checkpoint's has 8"),
        (26, {"frames": 64}, "for frames 32, not for 64"),
        (26, {"merge_layers": (8, 21)}, "for merge_layers 8,21,23, not for 8,21"),
        (8, {"frame_budgets": (2,)}, "calibrate on this checkpoint"),
    ):
        with pytest.raises(ConfigError, match=says):
            PRESET.check_fits(layers, changes)
