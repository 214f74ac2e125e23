"""What every test shares: seeds, a number of threads, the golden archives, skips for hardware that is not there."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from tests.shared import make_home

GOLDEN = Path(__file__).parent / "golden"

# A shell that runs the tests in the background has Ctrl-C ignored, for them and for what they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before any work: results of a sum must not depend on the machine's core count. Two workers, as `make test` has, take
# a thread each, and so does what they start; tests hold with one thread and with two.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if WORKER else 2)
os.environ["OMP_NUM_THREADS"] = "1" if WORKER else "2"
gc.freeze()  # an export makes many objects and few cycles: a fifth of its time would go into looking for them
gc.set_threshold(100_000, 20, 100)
settings.register_profile("earlytom", deadline=None, derandomize=True)
settings.load_profile("earlytom")


def pytest_configure(config: pytest.Config) -> None:
    if not WORKER:
        config.add_cleanup(make_home().cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "trt": None
        if any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx"))
        else "needs tensorrt or tensorrt_rtx",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for every test, whichever tests run with it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module whose tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The directory of the released code's own answers."""
    return GOLDEN


@pytest.fixture(scope="session")
def e2e_frames() -> NDArray[np.uint8]:
    """The clip of the golden end-to-end cases, uint8 [32, 384, 384, 3], read-only."""
    with np.load(GOLDEN / "e2e" / "frames.npz") as archive:
        video: NDArray[np.uint8] = archive["video"]
    video.setflags(write=False)
    return video


@pytest.fixture(scope="session")
def pixels(e2e_frames: NDArray[np.uint8]) -> torch.Tensor:
    """That clip as an image processor gives it, [32, 3, 384, 384]."""
    frames = torch.from_numpy(e2e_frames.copy()).permute(0, 3, 1, 2)
    return (frames / 255 - 0.5) / 0.5
