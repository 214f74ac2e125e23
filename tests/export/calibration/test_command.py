"""`earlytom-calibrate` on a few small clips: what it counts, writes, takes up again, and refuses in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import export.calibration.run as run_module
from earlytom import load, reference
from earlytom.calibration.budgets import percentile_budgets
from earlytom.calibration.merging import Form, merge_clip
from earlytom.calibration.preset_file import read_preset
from earlytom.calibration.result import Calibration
from earlytom.config import EarlyTomConfig
from earlytom.flops import tower_flops, unpruned_config
from earlytom.video import read_frames
from earlytom.video.clips import synthetic_clip
from export.calibration.command import main
from export.calibration.options import CalibrateOptions
from export.calibration.run import calibrate
from export.calibration.text import describe, histogram_text
from export.cli import export_parser, filled
from export.settings import ExportOptions, resolve
from tests import clips
from tests.cases import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ["--checkpoint", str(TINY), "--frames", "8", "--retain", "0.25", "--merge-layers", "0,1", "--tau", "0.3"]
CLIPS = 4


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of clips of two or three scenes, the same broken file twice among them, and a text."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(CLIPS):
        clips.write(folder / f"clip{seed}.mp4", synthetic_clip(14 + 2 * seed, 64, seed=seed))
    for name in ("clip1b.mp4", "copy.mp4"):
        (folder / name).write_bytes(b"no video at all")
    (folder / "notes.txt").write_text("not looked at")
    return folder


class Done:
    """A run of the command, its files, and what it printed."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.folder, self.videos = folder, videos
        self.preset, self.journal = folder / "mine.json", folder / "kept.jsonl"

    def run(self, *more: object) -> int:
        return main([str(self.videos), *SETTINGS, "--workers", "0", *map(str, more)])

    def keeping(self, *more: object) -> int:
        return self.run("--output", self.preset, "--journal", self.journal, "--json", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Done:
    done = Done(tmp_path_factory.mktemp("whole"), videos)
    assert done.keeping() == 3
    return done


@pytest.fixture
def again(whole: Done, tmp_path: Path) -> Done:
    """The same in another directory, with the journal of the whole run."""
    shutil.copy(whole.journal, tmp_path)
    return Done(tmp_path, whole.videos)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[list[Form]]:
    """What is computed from here on, clip by clip."""
    computed: list[list[Form]] = []

    def watched(vision: Any, config: EarlyTomConfig, frames: Tensor, forms: list[Form]) -> Any:
        computed.append(list(forms))
        return merge_clip(vision, config, frames, forms)

    monkeypatch.setattr(run_module, "merge_clip", watched)
    return computed


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_counts_budgets_costs_and_a_preset(
    again: Done, forms: list[list[Form]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert again.keeping() == 3
    found, preset = printed(capsys), read_preset(again.preset)
    assert not forms, "all of it is in the journal"
    model = load(TINY, parts=("vision",))
    counts = []
    for seed in range(CLIPS):
        frames = torch.from_numpy(read_frames(again.videos / f"clip{seed}.mp4", frames=8).frames)
        counts.append(reference.frame_counts(model, frames, tau=0.3, max_window=6, ema=0.9, merge_layers=(0, 1)))
    assert [clip["counts"] for clip in found["clips"]] == counts and len(set(map(tuple, counts))) > 1
    assert [Path(skipped["file"]).name for skipped in found["skipped"]] == ["clip1b.mp4", "copy.mp4"]
    for stage, layer in enumerate(found["layers"]):
        assert layer["layer"] == stage
        assert sum(layer["histogram"].values()) == CLIPS
        assert all(layer["histogram"][str(clip[stage])] for clip in counts)

    config = EarlyTomConfig(retain=0.25, frames=8, merge_layers=(0, 1), tau=0.3)
    budgets = percentile_budgets(counts, 50, config)
    assert (preset.name, preset.frame_budgets, preset.merge_layers, preset.tau) == ("mine", budgets, (0, 1), 0.3)
    assert (preset.made_from.clips, preset.made_from.percentile, preset.made_from.layers) == (CLIPS, 50, 6)
    assert preset.made_from.digest == model.identity.digest
    full, default, proposed = (
        tower_flops(with_budgets, model.geometry).total
        for with_budgets in (unpruned_config(config), config, config.replace(frame_budgets=budgets))
    )
    assert found["unpruned_flops"] == full
    assert [choice["name"] for choice in found["choices"]] == ["released rules", "default", "proposed"]
    assert [choice["flops"] for choice in found["choices"]][1:] == [default, proposed]
    for choice in found["choices"][1:]:
        agreement = choice["agreement"]
        assert agreement["clips"] == CLIPS
        assert agreement["equal"] == sum(clip == choice["budgets"] for clip in counts)
        assert agreement["same"] >= agreement["equal"]

    exported = filled(ExportOptions, export_parser().parse_args(["--preset", str(again.preset)]))
    assert resolve(exported, model.identity, {}).replace(inner=None) == config.replace(frame_budgets=budgets)


def test_an_interrupted_run_goes_on_where_it_stood(
    whole: Done, again: Done, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert again.keeping() == 3
    uninterrupted = printed(capsys)
    done, computed = Done(tmp_path_factory.mktemp("interrupted"), whole.videos), list[list[Form]]()

    def interrupted(*given: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(given[3])
        return merge_clip(*given)

    monkeypatch.setattr(run_module, "merge_clip", interrupted)
    assert done.keeping() == 130
    told = capsys.readouterr().err
    assert str(done.journal) in told and "Traceback" not in told
    assert [file.name for file in done.folder.iterdir()] == [done.journal.name]
    done.journal.write_bytes(done.journal.read_bytes()[:-9])  # the last line, of the second clip, was cut off as well
    computed.clear()
    monkeypatch.setattr(run_module, "merge_clip", lambda *given: computed.append(given[3]) or merge_clip(*given))
    assert done.keeping() == 3
    assert sum(None in forms for forms in computed) == CLIPS - 2
    assert printed(capsys) == uninterrupted and done.preset.read_bytes() == whole.preset.read_bytes()


def test_other_budgets_count_nothing_again(
    again: Done, forms: list[list[Form]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert again.keeping("--percentile", "100", "--compare", "2") == 3
    found = printed(capsys)
    budgets = tuple(found["proposal"]["budgets"])
    assert budgets == tuple(max(2, *(clip["counts"][stage] for clip in found["clips"])) for stage in (0, 1))
    others = [clip for clip in found["clips"][:2] if tuple(clip["counts"]) != budgets]
    assert others and forms == [[budgets]] * len(others), "the released rules are known"
    assert found["choices"][2]["agreement"]["clips"] == 2

    assert again.keeping("--target-flops", "0.5", "--compare", "0") == 3
    found = printed(capsys)
    share = found["choices"][2]["flops"] / found["unpruned_flops"]
    assert share <= 0.5 and found["target_flops"] == 0.5 * found["unpruned_flops"]
    assert found["choices"][2]["agreement"] is None
    assert read_preset(again.preset).made_from.target_flops == found["target_flops"]

    assert again.run("--journal", again.journal, "--tau", "0.2") == 1
    assert "of another calibration" in capsys.readouterr().err


def test_named_videos_that_all_can_be_read_are_a_success(whole: Done, again: Done, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{whole.videos / 'clip0.mp4'}\n")
    arguments = [f"@{tmp_path / 'list.txt'}", str(whole.videos / "clip2.mp4"), *SETTINGS, "--quiet"]
    assert main([*arguments, "--journal", str(again.journal)]) == 0
    assert main([str(whole.videos / "clip1b.mp4"), *SETTINGS]) == 1


def result(again: Done) -> Calibration:
    method = ExportOptions(checkpoint=str(TINY), frames=8, retain=0.25, merge_layers=(0, 1), tau=0.3)
    return calibrate(CalibrateOptions((str(again.videos),), method, journal=again.journal, workers=0))


def test_for_people(again: Done, tmp_path: Path) -> None:
    text = describe(result(again))
    assert "4 clips of 8 frames" in text and "after layer 0" in text and "after layer 1" in text
    for word in ("unpruned", "released rules", "default", "proposed", "of 4", "TFLOP", "clip1b.mp4"):
        assert word in text
    assert "proposed frame budgets" in text and "percentile 50" in text


def test_a_picture_is_the_same_file_twice(again: Done, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra: pip install earlytom-export[plot]")
    from export.calibration.picture import draw_histograms

    for name in ("a.svg", "b.svg", "c.png"):
        draw_histograms(result(again), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_histogram_puts_neighbours_together_where_there_are_too_many() -> None:
    few = histogram_text({3: 1, 5: 4}, {5: "proposed", 7: "default"}).splitlines()
    assert [line.split()[:2] for line in few] == [["3", "1"], ["4", "0"], ["5", "4"], ["6", "0"], ["7", "0"]]
    assert few[2].endswith("<- proposed") and few[4].endswith("<- default") and few[2].count("#") == 40
    assert few[0].count("#") == 10
    many = histogram_text(dict.fromkeys(range(1, 33), 2), {20: "proposed"}).splitlines()
    assert len(many) == 16 and many[0].split()[:2] == ["1-2", "4"] and many[9].endswith("<- proposed 20")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--output", "preset.txt"], "must end in .json"),
        (["--output", "/proc/at/all/preset.json"], "the directory of the preset"),
        (["--plot", "picture.gif"], ".png or .svg"),
        (["--checkpoint", "/nowhere/at/all"], "no checkpoint"),
        (["--merge-layers", "", "--retain", "1"], "nothing to calibrate"),
        (["--merge-layers", "0,6"], "merge layer 6 does not exist"),
        (["--device", "tpu"], "no device"),
        (["--target-flops", "0.2"], "no budgets cost"),
        (["--preset", "/nowhere/preset.json"], "cannot be read"),
        (["--journal", "/nowhere/kept.jsonl"], "/nowhere/kept.jsonl"),
    ],
)
def test_errors_are_one_sentence_before_any_work(
    more: list[str], says: str, videos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earlytom.checkpoint.loader.read_tensors", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(videos), *SETTINGS, *more]) == 1
    told = capsys.readouterr()
    assert says in told.err and "Traceback" not in told.err and not told.out


@pytest.mark.parametrize(
    "more",
    [["--percentile", "101"], ["--percentile", "half"], ["--target-flops", "0"], ["--target-flops", "inf"],
     ["--percentile", "50", "--target-flops", "0.5"], ["--workers", "-1"], ["--preset", "best"], ["--perc", "50"]],
)
def test_options_that_do_not_fit(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["video.mp4", *more])
    assert stop.value.code == 2
