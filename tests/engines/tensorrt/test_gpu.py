"""Real engines on a card: the numbers of ONNX Runtime, graphs that replay bit for bit, memory that does not grow."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earlytom.errors import BundleError, EngineError
from earlytom.tower import StaticTower
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.reader import Bundle
from engines.bundle.writer import BundleWriter, update_bundle
from engines.cards import current_card
from engines.onnxruntime import OnnxRuntimeRunner
from engines.products import product_of
from engines.pytorch import TorchRunner
from engines.runner import OpenOptions
from engines.tensorrt.build import BuildOptions, build_engine
from engines.tensorrt.inspect import inspect_file
from engines.tensorrt.runner import open_bundle
from export.onnx.exporter import export_tower
from tests.cases import SMALL, small_clip, small_config, small_vision
from tests.engines.bundle.test_bundle import CHECKPOINT

pytestmark = [pytest.mark.gpu, pytest.mark.trt]
PRODUCTS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@pytest.fixture(scope="module", params=list(PRODUCTS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small tower in float16 with an engine for this card."""
    product, card = request.param, current_card()
    if importlib.util.find_spec(PRODUCTS[product]) is None:
        pytest.skip(f"{product} is not installed")
    assert card is not None
    offered = product_of(product).targets
    if offered and card.target not in offered:
        pytest.skip(f"{product} does not build for {card.target}")
    config, folder = small_config(), tmp_path_factory.mktemp(product)
    with BundleWriter(folder / "b") as writer:
        export_tower(StaticTower(small_vision().half(), config).eval(), writer.path / MODEL, opset=20)
        manifest = Manifest.derive(
            config, SMALL, dtype="fp16", opset=20, attention="primitives", checkpoint=CHECKPOINT, tools={}
        )
        made = writer.commit(manifest)
    targets = (card.target,) if offered else ()
    record = build_engine(made.path / MODEL, manifest, folder, BuildOptions(product=product, targets=targets))
    return update_bundle(made, add={record.file: folder / record.file}, engines=[record])


@pytest.fixture(scope="module")
def runner(bundle: Bundle) -> Iterator[object]:
    with open_bundle(bundle.manifest.engines[0].product, bundle, OpenOptions()) as opened:
        yield opened


def test_the_numbers_are_onnx_runtimes_and_the_towers(bundle: Bundle, runner: TorchRunner) -> None:
    manifest = bundle.manifest
    ort = OnnxRuntimeRunner(bundle.file(MODEL), manifest.inputs, manifest.outputs, providers=["CPUExecutionProvider"])
    tower = TorchRunner(small_vision().half().cuda(), manifest.config)
    for seed in range(3):
        clip = small_clip(manifest.config.frames, seed=seed)
        ours = runner.run(clip.cuda())
        for other in (ort.run(clip), tower.run(clip)):
            torch.testing.assert_close(ours.weights.cpu(), other.weights.cpu(), rtol=1e-2, atol=1e-2)
            assert torch.equal(ours.positions.cpu(), other.positions.cpu())
            cosine = torch.cosine_similarity(ours.tokens.float().cpu(), other.tokens.float().cpu(), dim=-1)
            assert float(cosine.min()) > 0.999


def test_replay_is_bit_equal_to_plain_execution(bundle: Bundle, runner: TorchRunner) -> None:
    options = OpenOptions(cuda_graph=False)
    with open_bundle(bundle.manifest.engines[0].product, bundle, options) as plain:
        for seed in range(3):
            clip = small_clip(bundle.manifest.config.frames, seed=seed).cuda()
            for a, b in zip(runner.run(clip), plain.run(clip)):
                assert torch.equal(a, b)


def test_frames_from_the_host_and_from_other_streams(bundle: Bundle, runner: TorchRunner) -> None:
    clips = [small_clip(bundle.manifest.config.frames, seed=seed) for seed in range(4)]
    expected = [runner.run(clip.cuda()).tokens.cpu() for clip in clips]

    def work(index: int) -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return runner.run(clips[index % 4].pin_memory() if index % 2 else clips[index % 4].cuda()).tokens.cpu()

    with ThreadPoolExecutor(4) as pool:
        for index, tokens in enumerate(pool.map(work, range(40))):
            assert torch.equal(tokens, expected[index % 4])


def test_memory_does_not_grow(bundle: Bundle, runner: TorchRunner) -> None:
    clip = small_clip(bundle.manifest.config.frames).cuda()
    for _ in range(20):
        runner.run(clip)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(1000):
        runner.run(clip)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= before


def test_looking_at_engines_with_and_without_weights(bundle: Bundle, runner: TorchRunner, tmp_path: Path) -> None:
    """As the export does: one built with weights has no refitter, one without them needs it."""
    (record,), manifest = bundle.manifest.engines, bundle.manifest
    if record.product != "tensorrt":
        pytest.skip("engines of TensorRT for RTX are read from their file, and hold their weights")
    assert inspect_file(bundle.file(record.file), record.product, manifest).kernels > 0
    stripped = build_engine(bundle.file(MODEL), manifest, tmp_path, BuildOptions(record.product, strip_weights=True))
    assert inspect_file(tmp_path / stripped.file, record.product, manifest, bundle.file(MODEL)).kernels > 0
    with BundleWriter(tmp_path / "b") as writer:
        for name in (MODEL, f"{MODEL}.data"):
            (writer.path / name).write_bytes(bundle.file(name).read_bytes())
        (writer.path / stripped.file).write_bytes((tmp_path / stripped.file).read_bytes())
        other = writer.commit(replace(manifest, engines=(stripped,), files={}))
    clip = small_clip(manifest.config.frames)
    with open_bundle(record.product, other, OpenOptions()) as refitted:
        torch.testing.assert_close(refitted.run(clip).tokens, runner.run(clip).tokens, rtol=1e-2, atol=1e-2)


def test_a_changed_engine_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    record = bundle.manifest.engines[0]
    path = bundle.path / record.file
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises((BundleError, EngineError), match="SHA-256"):
            open_bundle(record.product, bundle, OpenOptions())
    finally:
        path.write_bytes(content)
