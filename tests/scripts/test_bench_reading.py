"""The benchmark of reading says what was decoded, and makes the same video again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import bench_reading
from scripts.bench_reading import main, moving_textures


def test_a_short_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_reading, "RATE", 4)  # 240 frames a minute, a key frame every 8
    video, output = tmp_path / "long.mp4", tmp_path / "numbers.json"
    asked = ["--minutes", "1", "--height", "64", "--frames", "8", "--video", str(video), "--output", str(output)]
    assert main(asked) == 0
    found = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["equal"] is True and found["whole_because"] == "" and found["encode_seconds"] > 0
    assert found["video"]["frames"] == found["whole"]["decoded"] == 240 and found["video"]["bytes"] > 0
    assert 8 <= found["sampled"]["decoded"] <= 8 * 8
    assert found["speedup"] > 0 and found["whole"]["seconds"] > 0 and len(found["sampled"]["seconds"]) == 3
    assert {"av", "pillow", "numpy"} <= set(found["machine"]["versions"])

    assert main([*asked, "--runs", "1"]) == 0
    again = json.loads(output.read_text())
    assert again["encode_seconds"] is None and again["video"] == found["video"], "the video that is there is read"


def test_the_textures_move_and_are_the_same_every_time() -> None:
    first, again = (np.stack(list(moving_textures(12, 32, 48))) for _ in range(2))
    assert first.shape == (12, 48, 48) and first.dtype == np.uint8 and np.array_equal(first, again)
    assert all((a != b).mean() > 0.2 for a, b in zip(first, first[1:]))
