"""What the tower keeps at once: pruning costs no memory, although the last merge layer looks into its attention."""

import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from earlytom.config import EarlyTomConfig
from earlytom.flops import unpruned_config
from earlytom.tower import StaticTower
from earlytom.vision.geometry import VisionGeometry
from earlytom.vision.siglip import Vision
from tests.cases import small_clip, small_vision

# 32 frames, budgets 20, 12, 8. What a layer keeps does not depend on the number of layers: four are enough.
CONFIG = EarlyTomConfig(retain=0.2, merge_layers=(0, 1, 2))
FULL_SIZE = VisionGeometry(layers=4)
# Patches and widths by a ninth, twice the heads: a whole attention matrix would show.
NINTH = VisionGeometry(
    image_size=126, patch_size=14, hidden_size=128, heads=32, intermediate_size=480, layers=4, projector_size=400
)


@dataclass
class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, as operators return them; weights and inputs do not count."""

    now: int = 0
    peak: int = 0
    largest: int = 0
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return made

    def add(self, storage) -> None:
        if storage._cdata in self.seen:  # a view, or an operator in place
            return
        size = storage.nbytes()
        self.seen.add(storage._cdata)
        weakref.finalize(storage, self.remove, storage._cdata, size)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def planned(config: EarlyTomConfig, dtype: torch.dtype) -> Live:
    """Of the full-size tower, without computing anything: its tensors have shapes, but no contents."""
    with FakeTensorMode(), torch.inference_mode():
        torch.set_default_dtype(dtype)  # a fake tensor cannot be converted in place
        try:
            vision = Vision(FULL_SIZE)
        finally:
            torch.set_default_dtype(torch.float32)
        tower = StaticTower(vision, config)
        frames = torch.zeros(tower.shapes.inputs["frames"][1], dtype=torch.uint8)
        with Live() as live:
            tower(frames)
    return live


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_full_size_tower_keeps_no_more_than_the_unpruned_one(dtype):
    full, pruned = planned(unpruned_config(CONFIG), dtype), planned(CONFIG, dtype)
    print(f"{dtype}: peak {full.peak / 1e6:.1f} MB unpruned, {pruned.peak / 1e6:.1f} MB pruned")  # pytest -s
    mlp = 32 * 729 * 4304 * dtype.itemsize
    assert full.peak > 2 * mlp, "what is counted holds fc1's output and its GELU"
    assert pruned.peak <= 1.05 * full.peak
    assert pruned.largest <= full.largest


def allocated(config: EarlyTomConfig) -> int:
    """Peak of what torch's allocator hands out, temporaries inside operators included, beside weights and frames."""
    tower, frames = StaticTower(small_vision(NINTH), config), small_clip(config.frames, geometry=NINTH)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tower(frames)
    events = sorted(
        (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_torchs_allocator_says_the_same():
    full, pruned = allocated(unpruned_config(CONFIG)), allocated(CONFIG)
    assert full > 2 * 32 * 81 * 480 * 4
    assert pruned <= 1.05 * full
