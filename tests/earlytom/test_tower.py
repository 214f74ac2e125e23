"""The static tower: the oracle's answers in fixed shapes, one program for every clip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom import reference
from earlytom.checkpoint import load
from earlytom.config import EarlyTomConfig
from earlytom.errors import ConfigError, InputError
from earlytom.tower import StaticTower
from earlytom.vision.siglip import Attention, ReceivedAttention
from tests.cases import TINY, cases, small_clip, small_config, small_vision

E2E = cases("e2e/e2e")
SETTINGS = ("tau", "max_window", "ema", "merge_layers")


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, parts=("vision",)).vision


def settings_of(meta):
    return {name: meta[name] for name in SETTINGS}


def equal_counts(meta):
    """Whether the released code keeps as many patches of a dynamic frame as of a static one."""
    ratio = min(1.0, meta["retain_ratio"] / (meta["stages"][-1][1] / 32))
    return math.ceil(196 * ratio) == round(196 * ratio)


def config_at_the_oracles_counts(meta):
    return EarlyTomConfig(
        retain=meta["retain_ratio"], frames=32, merge_layers=tuple(meta["merge_layers"]),
        frame_budgets=tuple(after for _, after in meta["stages"]), **{n: meta[n] for n in SETTINGS[:3]},
    )


@pytest.mark.parametrize("case", E2E, ids=str)
def test_oracle_gives_the_released_visual_tokens(case, tiny, e2e_frames):
    frames, meta = torch.from_numpy(e2e_frames.copy()), case.meta
    tokens = reference.encode_video(tiny, frames, retain_ratio=meta["retain_ratio"], **settings_of(meta))
    torch.testing.assert_close(tokens, case["visual"], atol=1e-4, rtol=0)
    counts = reference.frame_counts(tiny, frames, **settings_of(meta))
    assert counts == [after for _, after in meta["stages"]]


def test_the_archive_has_settings_with_equal_counts():
    assert sum(equal_counts(case.meta) for case in E2E) >= 3


@pytest.mark.parametrize("attention", ["fused", "primitives"])
@pytest.mark.parametrize("case", [case for case in E2E if equal_counts(case.meta)], ids=str)
def test_static_tower_is_the_released_code_at_its_counts(case, attention, tiny, e2e_frames):
    tower = StaticTower(tiny, config_at_the_oracles_counts(case.meta), attention=attention)
    with torch.no_grad():
        outputs = tower(torch.from_numpy(e2e_frames.copy())[None])
    torch.testing.assert_close(outputs.tokens[0], case["visual"], atol=1e-4, rtol=0)
    ends = {frame for pair in case.meta["segments"] for frame in pair}
    assert set(outputs.dynamic[0].nonzero().flatten().tolist()) == ends


def test_composite_weights_say_what_each_frame_left_is_made_of(tiny, e2e_frames):
    """Merging frames of one picture each: the composite applied to frame numbers is what every stage did to them."""
    tower = StaticTower(tiny, config_at_the_oracles_counts(E2E[0].meta))
    with torch.no_grad():
        trace = tower.trace(torch.from_numpy(e2e_frames.copy())[None])
    numbers = torch.arange(32.0)[None, :, None]
    for stage in trace.stages:
        numbers = stage.weights @ numbers
    torch.testing.assert_close(trace.outputs.weights @ torch.arange(32.0)[None, :, None], numbers)
    torch.testing.assert_close(trace.outputs.weights.sum(-1), torch.ones(1, 17))


@pytest.mark.parametrize(
    ("changes", "geometry"),
    [
        ({}, {}),
        ({"contextual": 0.3}, {}),
        ({"pooling": "average", "newline": "grid", "frames": 64, "frame_budgets": (40, 30, 20)},
         {"pooling": "average", "newline": "grid"}),
        ({"pooling": "max", "newline": "no_token"}, {"pooling": "max", "newline": "no_token"}),
        ({"pooling": "average", "newline": "grid", "contextual": 0.4}, {"pooling": "average", "newline": "grid"}),
        ({"merge_layers": (2,), "frame_budgets": (6,)}, {}),
        ({"retain": 1.0, "frame_budgets": (12, 12, 12)}, {}),
    ],
    ids=["plain", "contextual", "llava-video", "max", "grid+contextual", "one layer", "nothing merged"],
)
def test_static_tower_is_the_oracle_where_their_counts_agree(changes, geometry):
    """Search a small clip for the oracle's counts, set the budgets to them, and compare token by token."""
    vision = small_vision(**geometry)
    base = small_config(**changes)
    clip = small_clip(base.frames, seed=3)
    free = {"tau": 0.55, "max_window": 6, "ema": 0.9, "merge_layers": base.merge_layers}
    counts = reference.frame_counts(vision, clip[0], **free) if base.retain < 1 else [12, 12, 12]
    if base.retain < 1:
        patches = 9
        # A ratio at which the released code keeps equally many patches of dynamic and static frames.
        keep = 4
        retain = keep * counts[-1] / (patches * base.frames)
        config = base.replace(retain=retain, frame_budgets=tuple(counts), tau=free["tau"])
        assert counts[-1] < base.frames, "the clip must have something to merge"
        assert math.ceil(patches * min(1.0, retain / (counts[-1] / base.frames))) == keep
    else:
        config = base.replace(tau=1.0, frame_budgets=(12, 12, 12))  # tau 1: the oracle cuts everywhere
        free["tau"] = 1.0
    tower = StaticTower(vision, config)
    expected = reference.encode_video(vision, clip[0], retain_ratio=config.retain, contextual=config.contextual, **free)
    tokens = tower(clip).tokens[0]
    torch.testing.assert_close(tokens[: len(expected)], expected, atol=1e-4, rtol=0)
    if config.newline == "grid":
        assert (tokens[len(expected) :] == vision.image_newline).all()
    else:
        assert len(tokens) == len(expected)


def test_videos_of_a_batch_do_not_mix():
    """Quirk 2: in the released code the second video of a batch is pruned by the first one's ratio."""
    vision, config = small_vision(), small_config()
    clips = small_clip(12, videos=3)
    together = StaticTower(vision, config, batch=3)(clips)
    for v in range(3):
        alone = StaticTower(vision, config)(clips[v : v + 1])
        for one, many in zip(alone, together):
            torch.testing.assert_close(many[v : v + 1], one)


def test_without_merge_layers_nothing_is_pruned():
    vision, clip = small_vision(), small_clip(12)
    config = EarlyTomConfig(retain=1, frames=12, merge_layers=())
    outputs = StaticTower(vision, config)(clip)
    torch.testing.assert_close(outputs.tokens[0], vision.encode_all(clip[0]))
    assert outputs.dynamic.all() and torch.equal(outputs.weights[0], torch.eye(12))


@pytest.mark.parametrize(
    ("changes", "newline"),
    [
        pytest.param({}, "one_token", id="plain"),
        pytest.param(
            {"contextual": 0.3, "merge_layers": (2,), "frame_budgets": (6,)}, "grid", id="contextual",
            marks=pytest.mark.slow,  # what it adds is exported in export/onnx/test_exporter.py
        ),
        pytest.param({"merge_layers": (), "retain": 1, "frame_budgets": ()}, "grid", id="unpruned"),
    ],
)
def test_one_exported_program_serves_every_clip(changes, newline):
    """torch.export in strict mode: no Python branch on data, no data-dependent shape."""
    tower = StaticTower(small_vision(newline=newline), small_config(newline=newline, **changes))
    clips = [small_clip(12, seed=seed) for seed in range(3)]
    program = torch.export.export(tower, (clips[0],), strict=True)
    for value in (node.meta.get("val") for node in program.graph.nodes):
        if isinstance(value, torch.Tensor):
            assert all(isinstance(size, int) for size in value.shape)
    outputs = [program.module()(clip) for clip in clips]
    for clip, found in zip(clips, outputs):
        for a, b in zip(found, tower(clip)):
            torch.testing.assert_close(a, b)
    if not changes.get("merge_layers", True):
        return
    assert not torch.equal(outputs[0].weights, outputs[1].weights), "the clips must differ for this to say anything"


def test_every_layer_has_fused_attention_and_the_last_merge_layer_gives_what_was_received(monkeypatch):
    asked = []
    plain = Attention.forward

    def watch(self, x, form="fused", received=False):
        asked.append(received)
        return plain(self, x, form, received)

    monkeypatch.setattr(Attention, "forward", watch)
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []
    watched = lambda *a, **k: calls.append(1) or fused(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    StaticTower(small_vision(), small_config(merge_layers=(0, 1, 2)))(small_clip(12))
    assert asked == [False, False, True, False] and len(calls) == 4


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 3), patches=st.integers(1, 40), heads=st.integers(1, 3), spread=st.floats(0.1, 8),
    seed=st.integers(0, 2**16),
)
def test_received_attention_is_the_mean_of_the_attention_matrix(frames, patches, heads, spread, seed):
    """Over heads and queries, whatever the blocks of queries; each frame's sums to 1."""
    q, k = torch.randn(2, frames, heads, patches, 4, generator=torch.Generator().manual_seed(seed)) * spread
    received = ReceivedAttention()(q, k, 0.5)
    expected = torch.softmax(0.5 * q.double() @ k.double().transpose(-1, -2), dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(received.double(), expected, atol=1e-6, rtol=1e-5)
    assert received.dtype == torch.float32
    for form in (torch.float16, torch.bfloat16):
        assert ReceivedAttention()(q.to(form), k.to(form), 0.5).dtype == torch.float32


def test_outputs_have_the_shapes_that_were_promised():
    for config in (small_config(), small_config(newline="grid", retain=0.1)):
        tower = StaticTower(small_vision(newline=config.newline), config, batch=2)
        outputs = tower(small_clip(12, videos=2))
        for (name, (dtype, shape)), value in zip(tower.shapes.outputs("float32").items(), outputs):
            assert getattr(outputs, name) is value
            assert tuple(value.shape) == shape and str(value.dtype) == f"torch.{dtype}"


def test_half_precision_keeps_the_plan_in_float32():
    vision, clip = small_vision(), small_clip(12)
    full = StaticTower(vision, small_config())(clip)
    half = StaticTower(vision.half(), small_config()).trace(clip)
    assert half.outputs.tokens.dtype == torch.float16
    assert half.outputs.weights.dtype == half.received.dtype == torch.float32
    assert all(stage.similarity.dtype == torch.float32 for stage in half.stages)
    torch.testing.assert_close(half.outputs.weights, full.weights, atol=2e-3, rtol=0)


def test_what_does_not_fit_is_refused():
    vision = small_vision()
    with pytest.raises(ConfigError, match="merge layer 40 does not exist"):
        StaticTower(vision, small_config(merge_layers=(0, 1, 40)))
    with pytest.raises(ConfigError, match="trained with bilinear"):
        StaticTower(vision, small_config(pooling="average"))
    with pytest.raises(ConfigError, match="fused, primitives"):
        StaticTower(vision, small_config(), attention="flash")
    with pytest.raises(InputError, match=r"\[1, 12, 84, 84, 3\]"):
        StaticTower(vision, small_config())(small_clip(11))
    with pytest.raises(InputError, match="uint8"):
        StaticTower(vision, small_config())(small_clip(12).float())
