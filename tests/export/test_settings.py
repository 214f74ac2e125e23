"""From what was typed to a configuration, and the progress on the way."""

import io
from dataclasses import fields

import pytest

from earlytom.calibration.preset_file import CalibratedPreset, Origin
from earlytom.checkpoint import CheckpointIdentity
from earlytom.config import InnerMerging
from earlytom.errors import ConfigError
from earlytom.vision.geometry import VisionGeometry
from export.cli import build_parser, export_parser, filled
from export.progress import Progress
from export.settings import EngineOptions, ExportOptions, resolve


def identity(**changes):
    values = {"name": "x", "format": "llava-next", "digest": "0", "geometry": VisionGeometry(), "pooling": "bilinear",
              "newline": "one_token", "language_layers": 28}
    return CheckpointIdentity(**(values | changes))


def settle(*argv, environ=None, **changes):
    return resolve(filled(ExportOptions, export_parser().parse_args(list(argv))), identity(**changes), environ or {})


def test_nothing_typed_is_the_published_setting_at_a_fifth():
    config = settle()
    assert (config.retain, config.frames, config.tau, config.merge_layers) == (0.2, 32, 0.5, (8, 21, 23))
    assert config.inner == InnerMerging(18, 0.5, "attention")


def test_what_was_typed_wins():
    config = settle(
        "--retain", "0.1", "--preset", "mvbench", "--tau", "0.9", "--frames", "16", "--merge-layers", "1,2",
        "--frame-budgets", "8,4", "--max-window", "5", "--ema", "0.5", "--contextual", "0.1", "--inner-layer", "3",
        "--inner-ratio", "0.25", "--inner-method", "dpc-knn",
    )
    assert (config.retain, config.tau, config.frames, config.merge_layers) == (0.1, 0.9, 16, (1, 2))
    assert (config.frame_budgets, config.max_window, config.ema, config.contextual) == ((8, 4), 5, 0.5, 0.1)
    assert config.inner == InnerMerging(3, 0.25, "dpc-knn")


def test_inner_merging_as_released():
    assert settle("--inner-as-released").inner == InnerMerging(18, 0.5, as_released=True)
    with pytest.raises(ConfigError, match="no inner merging here to be as released"):
        settle("--inner-as-released", "--inner-layer", "0")
    with pytest.raises(ConfigError, match="goes by attention, not by dpc-knn"):
        settle("--inner-as-released", "--inner-method", "dpc-knn")


def test_the_environment_counts_only_when_asked_for_and_below_what_was_typed():
    environ = {"RETAIN_RATIO": "0.15", "T": "0.4", "PRUNE_LAYERS": "4,5,6", "INNER_k": "7", "INNER_r": "0.3"}
    assert settle(environ=environ).tau == 0.5
    config = settle("--from-environment", "--tau", "0.6", environ=environ)
    assert (config.retain, config.tau, config.merge_layers) == (0.15, 0.6, (4, 5, 6))
    assert config.inner == InnerMerging(7, 0.3)
    with pytest.raises(ConfigError, match="variable T"):
        settle("--from-environment", environ={"T": "warm"})


def test_the_checkpoint_decides_geometry():
    video = settle(pooling="average", newline="grid")
    assert (video.frames, video.pooling, video.newline) == (64, "average", "grid")
    shallow = settle(geometry=VisionGeometry(layers=6), language_layers=6)
    assert shallow.merge_layers == (1, 4, 5)
    assert shallow.inner.layer == 3, "the published layer 18 of 28, at the same relative depth"
    assert settle("--inner-layer", "0").inner is None
    assert settle(language_layers=1).inner is None
    with pytest.raises(ConfigError, match=r"1\.\.27"):
        settle("--inner-layer", "28")


@pytest.fixture
def calibrated(tmp_path):
    """The file of a preset for a tower of 26 layers."""
    origin = Origin("x", "0", 26, 40, 50.0, None)
    path = tmp_path / "mine.json"
    CalibratedPreset("mine", 0.1, 32, (4, 12, 20), (18, 9, 5), 0.45, 7, 0.8, origin).write(path)
    return str(path)


def test_a_calibrated_preset_is_taken_and_what_was_typed_wins(calibrated):
    config = settle("--preset", calibrated)
    assert (config.retain, config.frames, config.merge_layers) == (0.1, 32, (4, 12, 20))
    assert (config.frame_budgets, config.tau, config.max_window, config.ema) == ((18, 9, 5), 0.45, 7, 0.8)
    assert config.inner == InnerMerging(18, 0.5, "attention"), "as published: calibration is of the tower"
    assert settle("--preset", calibrated, "--tau", "0.6", "--retain", "0.15") == config.replace(
        tau=0.6, retain=0.15, frame_budgets=(18, 9, 5)
    )
    assert settle("--preset", calibrated, "--frames", "16", "--frame-budgets", "9,5,3").frames == 16
    environ = {"T": "0.3"}
    assert settle("--preset", calibrated, environ=environ) == config
    assert settle("--preset", calibrated, "--from-environment", environ=environ).tau == 0.3
    video = settle("--preset", calibrated, pooling="average", newline="grid")
    assert (video.frames, video.frame_budgets, video.newline) == (32, (18, 9, 5), "grid")


@pytest.mark.parametrize(
    ("argv", "changes", "says"),
    [
        ([], {"geometry": VisionGeometry(layers=6)}, "tower of 26 layers .* has 6"),
        (["--frames", "64"], {}, "for frames 32, not for 64"),
        (["--merge-layers", "4,12"], {}, "for merge_layers 4,12,20, not for 4,12"),
        (["--retain", "0.3"], {}, "the last frame budget 5 cannot hold retain 0.3"),
    ],
)
def test_a_calibrated_preset_that_does_not_fit_is_refused(calibrated, argv, changes, says):
    with pytest.raises(ConfigError, match=says):
        settle("--preset", calibrated, *argv, **changes)


def test_what_is_no_preset_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_parser().parse_args(["--preset", "best"])
    assert "there is no 'best', only egoschema" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no preset 'best'"):
        resolve(ExportOptions(preset="best"), identity(), {})
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        settle("--preset", str(tmp_path / "none.json"))


def test_the_command_line_has_the_options_of_python_with_their_defaults():
    assert filled(ExportOptions, export_parser().parse_args([])) == ExportOptions()
    build = build_parser().parse_args(["bundle", "--engine", "tensorrt-rtx"])
    assert filled(EngineOptions, build) == EngineOptions(engine="tensorrt-rtx")
    typed = set(vars(export_parser().parse_args([]))) - {"dry_run", "json", "quiet"}
    assert typed == {field.name for field in fields(ExportOptions)}


def test_a_list_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        export_parser().parse_args(["--merge-layers", "8;21"])
    assert "not a list of whole numbers such as 20,12,8" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_tells_stages_in_a_log_and_steps_on_a_terminal():
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        progress = Progress(("load", "export"), stream=stream)
        with progress.stage("load"):
            progress.step("reading weights")
        assert progress.seconds["load"] >= 0
        with pytest.raises(KeyError), progress.stage("export"):
            raise KeyError
        assert "export" not in progress.seconds, "a stage that failed is not done"
    assert "load" in log.getvalue() and "reading weights" not in log.getvalue() and "\r" not in log.getvalue()
    assert "reading weights" in terminal.getvalue()
    quiet = io.StringIO()
    with Progress(("load",), quiet=True, stream=quiet).stage("load"):
        pass
    assert quiet.getvalue() == ""
