"""The configuration and every size that follows from it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom.config import EarlyTomConfig, InnerMerging, default_budgets
from earlytom.errors import ConfigError
from earlytom.presets import environment_settings, preset, scale_layers
from earlytom.shapes import derive_shapes, window_sizes
from earlytom.vision.geometry import VisionGeometry, pooled_grid

SO400M = VisionGeometry()

legal = st.builds(
    EarlyTomConfig,
    retain=st.floats(0.05, 0.5),
    frames=st.integers(8, 64),
    merge_layers=st.sampled_from([(23,), (8, 21), (8, 21, 23), (4, 14, 24), (0, 1, 2, 25)]),
    tau=st.floats(-1, 1),
    max_window=st.integers(2, 20),
    ema=st.floats(0, 1),
    pooling=st.sampled_from(["bilinear", "average", "max"]),
    newline=st.sampled_from(["one_token", "grid", "no_token"]),
    inner=st.none()
    | st.builds(InnerMerging, st.integers(1, 27), st.floats(0, 0.9), st.sampled_from(["attention", "dpc-knn"])),
    contextual=st.sampled_from([0.0, 0.1, 0.5]),
)


@given(legal)
def test_json_round_trip_changes_nothing(config):
    assert EarlyTomConfig.from_json(config.to_json()) == config
    assert EarlyTomConfig.from_dict(config.to_dict()).to_json() == config.to_json()


@given(legal)
def test_default_budgets_always_hold(config):
    budgets = (config.frames, *config.frame_budgets)
    assert all(b <= a for a, b in zip(budgets, budgets[1:]))
    assert budgets[-1] >= config.retain * config.frames - 1e-6
    shapes = derive_shapes(config, SO400M)
    assert shapes.keep == round(config.retain * config.frames * shapes.pooled_patches / budgets[-1])
    assert shapes.visual_tokens == shapes.keep * budgets[-1]
    assert shapes.dominant + shapes.contextual == shapes.keep
    assert sum(window_sizes(shapes.pooled_patches, shapes.keep)) == shapes.pooled_patches


@pytest.mark.parametrize("retain", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("frames", [8, 16, 24, 32, 48, 64])
def test_token_count_is_the_specified_one(retain, frames):
    config = EarlyTomConfig(retain=retain, frames=frames)
    budget = config.frame_budgets[-1]
    shapes = derive_shapes(config, SO400M)
    assert shapes.tokens == round(retain * frames * 196 / budget) * budget + 1
    assert shapes.outputs("float16")["tokens"] == ("float16", (1, shapes.tokens, 3584))


def test_the_defaults_are_those_of_the_method():
    config = EarlyTomConfig()
    assert (config.retain, config.frames, config.frame_budgets) == (0.2, 32, (20, 12, 8))
    assert default_budgets(64, 0.25, 3) == (40, 24, 16)
    assert derive_shapes(config, SO400M).keep == 157  # round(.2 * 32 * 196 / 8)
    assert (SO400M.grid, SO400M.patches, SO400M.head_dim) == (27, 729, 72)
    assert (pooled_grid(27, "bilinear"), pooled_grid(27, "average")) == (14, 13)


def test_windows_are_contiguous_and_the_first_are_longer():
    assert window_sizes(10, 4) == [3, 3, 2, 2]
    assert window_sizes(4, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("benchmark", "retain", "model", "tau", "layers"),
    [
        ("mvbench", 0.10, "llava-onevision", 0.65, (8, 14, 20)),
        ("mvbench", 0.25, "llava-onevision", 0.8, (6, 14, 20)),
        ("videomme", 0.10, "llava-onevision", 0.3, (10, 21, 23)),
        ("videomme", 0.15, "llava-onevision", 0.4, (8, 21, 23)),
        ("videomme", 0.20, "llava-onevision", 0.5, (8, 21, 23)),
        ("videomme", 0.25, "llava-onevision", 0.7, (10, 21, 23)),
        ("longvideobench", 0.25, "llava-onevision", 0.8, (4, 14, 24)),
        ("egoschema", 0.20, "llava-onevision", 0.6, (10, 21, 23)),
        ("videomme", 0.25, "llava-video", 0.6, (10, 21, 23)),
        ("longvideobench", 0.25, "llava-video", 0.8, (6, 21, 23)),
        ("longvideobench", 0.15, "llava-video", 0.5, (10, 21, 23)),
    ],
)
def test_presets_are_the_published_settings(benchmark, retain, model, tau, layers):
    config = preset(benchmark, retain, model=model)
    assert (config.tau, config.merge_layers, config.max_window, config.ema) == (tau, layers, 6, 0.9)
    assert config.inner == InnerMerging(layer=18, ratio=0.5, method="attention")
    assert config.frames == (64 if model == "llava-video" else 32)
    geometry = ("average", "grid") if model == "llava-video" else ("bilinear", "one_token")
    assert (config.pooling, config.newline) == geometry


@pytest.mark.parametrize(("layers", "expected"), [(None, 18), (28, 18), (19, 18), (18, 11), (6, 3), (2, 1), (1, None)])
def test_inner_merging_in_a_shallow_llm_is_at_the_same_relative_depth(layers, expected):
    inner = preset(llm_layers=layers).inner
    assert (inner and inner.layer) == expected
    assert inner is None or inner.ratio == 0.5


def test_a_ratio_between_the_published_ones_takes_the_nearest():
    assert preset("videomme", 0.3).tau == 0.7
    assert preset("videomme", 0.3).retain == 0.3
    assert preset("videomme", 0.11).tau == 0.3


def test_published_layers_scale_to_another_depth():
    assert scale_layers((8, 21, 23), 26) == (8, 21, 23)
    assert scale_layers((8, 21, 23), 6) == (1, 4, 5)
    assert scale_layers((8, 21, 23), 1) == (0,)


def test_the_environment_is_the_originals():
    environ = {"RETAIN_RATIO": "0.15", "T": "0.4", "M": "6", "EMA": "0.9", "PRUNE_LAYERS": "8,21,23", "INNER_k": "18",
               "INNER_r": "0.5", "BETA": "0.7", "D": "0.1", "K": "5", "PATH": "/bin"}
    settings = environment_settings(environ)
    assert EarlyTomConfig(**settings) == EarlyTomConfig(
        retain=0.15, tau=0.4, max_window=6, ema=0.9, merge_layers=(8, 21, 23), inner=InnerMerging(18, 0.5), beta=0.7,
        contextual=0.1, neighbours=5,
    )
    assert environment_settings({}) == {}
    assert environment_settings({"INNER_k": "18"}) == {}, "the original merges only when both are set"
    for name, value in (("T", "high"), ("PRUNE_LAYERS", "8;21"), ("M", "6.5")):
        with pytest.raises(ConfigError, match=name):
            environment_settings({name: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"retain": 0}, "retain is 0"),
        ({"retain": 1.5}, "retain is 1.5"),
        ({"retain": math.nan}, "retain is nan"),
        ({"retain": math.inf}, "retain is inf"),
        ({"retain": "0.2"}, "retain is '0.2'"),
        ({"retain": True}, "retain is True"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 8.0}, "frames is 8.0"),
        ({"frame_budgets": (12, 20, 8)}, "budgets must not grow, at most 12 fits"),
        ({"frame_budgets": (40, 20, 8)}, "more than the 32 frames"),
        ({"frame_budgets": (20, 12, 6)}, "at least 7 frames are needed, or a retain of at most 0.1875"),
        ({"frame_budgets": (20, 8)}, "2 frame_budgets"),
        ({"frame_budgets": ()}, "0 frame_budgets"),
        ({"merge_layers": (8, 8, 23)}, "strictly increasing"),
        ({"merge_layers": (-1, 8, 23)}, "0 or more"),
        ({"merge_layers": "8,21"}, "list of whole numbers"),
        ({"merge_layers": ()}, "nothing can be pruned"),
        ({"merge_layers": (), "retain": 1, "frame_budgets": (8,)}, "no merge layers"),
        ({"tau": 1.1}, "tau is 1.1"),
        ({"ema": -0.1}, "ema is -0.1"),
        ({"max_window": 1}, "at least 2"),
        ({"contextual": 1.0}, "below 1"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"pooling": "mean"}, "bilinear, average, max"),
        ({"newline": "frame"}, "one_token, grid, no_token"),
        ({"inner": 18}, "InnerMerging"),
        ({"inner": {"ratio": 0.5}}, "layer"),
    ],
)
def test_an_impossible_setting_is_refused_with_what_fits(changes, says):
    with pytest.raises(ConfigError) as error:
        EarlyTomConfig(**changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_only_the_geometry_shows_is_refused_there():
    with pytest.raises(ConfigError, match=r"merge layer 40 does not exist: the tower has 26 layers.*0\.\.25"):
        derive_shapes(EarlyTomConfig(merge_layers=(8, 40)), SO400M)
    with pytest.raises(ConfigError, match="keeps no patch"):
        derive_shapes(EarlyTomConfig(retain=0.0001), SO400M)
    with pytest.raises(ConfigError, match="batch is 0"):
        derive_shapes(EarlyTomConfig(), SO400M, batch=0)
    with pytest.raises(ConfigError, match="heads"):
        VisionGeometry(hidden_size=100, heads=16)


def test_json_that_is_no_configuration_is_refused():
    for text, says in (("{", "not JSON"), ("[]", "must be an object"), ('{"retian": 0.2}', "unknown setting retian")):
        with pytest.raises(ConfigError, match=says):
            EarlyTomConfig.from_json(text)


def test_replace_derives_budgets_anew_unless_given():
    assert EarlyTomConfig().replace(frames=64).frame_budgets == (40, 24, 16)
    assert EarlyTomConfig().replace(tau=0.3).frame_budgets == (20, 12, 8)
    assert EarlyTomConfig().replace(retain=0.1, frame_budgets=(16, 8, 4)).frame_budgets == (16, 8, 4)
