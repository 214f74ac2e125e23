"""The TensorRT runner without a card: what may be loaded, the command that rebuilds, contexts, graphs, kept kernels."""

from __future__ import annotations

import gc
import re
import shlex
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earlytom.errors import BundleError, EngineError, InputError
from earlytom.presets import preset
from earlytom.vision.geometry import VisionGeometry
from engines.bundle.manifest import BuildSettings, EngineRecord, Manifest
from engines.bundle.reader import Bundle, digest_file, read_bundle
from engines.bundle.writer import BundleWriter
from engines.cards import Card, show_targets
from engines.runner import OpenOptions
from engines.tensorrt import context as tensorrt_context
from engines.tensorrt import runner as tensorrt_run
from engines.tensorrt.cache import CacheFile, cache_path
from engines.tensorrt.guard import OBJECTIONS, choose_record, rebuild_command, refusal
from engines.tensorrt.runner import TensorRTRunner, open_bundle, probe
from export.cli import build_parser, filled
from export.settings import EngineOptions
from tests import fake_tensorrt as fake
from tests.engines.bundle.test_bundle import CHECKPOINT, make_engine, make_manifest
from tests.fake_tensorrt_builder import RECORDS

A100 = Card("NVIDIA A100-SXM4-80GB", "sm80", "580.95.05", "13.0")
H100 = Card("NVIDIA H100", "sm90", "580.95.05", "13.0")
RTX, FULL = "1.7.1", "11.2.1.2"
FILE = "vision.sm80.rtx.engine"


def sentence(call: Callable[[], Any], kind: type[Exception] = EngineError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def full(file: str = "vision.sm80.trt.engine", **changes: Any) -> EngineRecord:
    values = {"product": "tensorrt", "version": FULL, "gpu": A100.name, "settings": BuildSettings(1 << 30)}
    return make_engine(file, **(values | changes))


def make_bundle(path: Path, *records: EngineRecord, content: bytes | None = None, **changes: Any) -> Bundle:
    manifest = make_manifest(engines=records, **changes)
    with BundleWriter(path) as writer:
        (writer.path / "vision.onnx").write_bytes(b"graph")
        for record in records:
            data = fake.plan(manifest.inputs, manifest.outputs) if content is None else content
            (writer.path / record.file).write_bytes(data)
        return writer.commit(manifest)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this machine one with a card and a product."""

    def make(card: Card | None = A100, product: str = "tensorrt-rtx", version: str = RTX) -> None:
        module = fake.module(product.replace("-", "_"), version)
        monkeypatch.setattr(tensorrt_run, "current_card", lambda index=0: card)
        monkeypatch.setattr(tensorrt_run, "import_product", lambda name: module)
        monkeypatch.setattr(tensorrt_run, "_cuda_device", lambda asked, card: torch.device("cpu"))
        for place in (tensorrt_run, tensorrt_context):
            monkeypatch.setattr(place, "cuda", fake.cuda())

    return make


def frames(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 8, 56, 56, 3), dtype=torch.uint8, generator=generator)


def expected(clip: torch.Tensor) -> torch.Tensor:
    return torch.arange(17 * 24, dtype=torch.float32).view(1, 17, 24) + float(clip.double().mean())


# ---- what may be loaded


@pytest.mark.parametrize(
    ("record", "card", "version", "expected"),
    [
        (make_engine(), A100, RTX, None),
        (make_engine(targets=("sm80", "sm89")), A100, RTX, None),
        (make_engine(), H100, RTX, "is for sm80 (A100)"),
        (make_engine(), A100, "1.7.2", "was built with TensorRT for RTX 1.7.1 and this machine has 1.7.2"),
        (make_engine(compatibility="ampere+"), H100, RTX, None),
        (full(), A100, FULL, None),
        (full(), A100, "11.2.1.3", "an engine runs on exactly the version that built it"),
        (full(), H100, FULL, "is for sm80 (A100)"),
        (full(compatibility="ampere+"), H100, FULL, None),
        (full(compatibility="ampere+"), Card("T4", "sm75", None, "12.0"), FULL, "with hardware compatibility ampere+"),
        (full(compatibility="ampere+"), Card("B200", "sm100", None, "13.0"), FULL, None),
        (full(compatibility="same-cc"), Card("A30", "sm80", None, "13.0"), FULL, None),
        (full(compatibility="same-cc"), H100, FULL, "with hardware compatibility same-cc"),
        (full(version_compatible=True), A100, "11.3.0.1", None),
        (full(version_compatible=True), A100, "11.10.0.1", None),
        (full(version_compatible=True), A100, "11.2.0.9", "the same and later versions of their major"),
        (full(version_compatible=True, version="10.15.1.29"), A100, "11.2.1.2", None),
        (full(version_compatible=True), A100, "12.0.0.1", "was built with TensorRT 11.2.1.2"),
        (full(version_compatible=True), H100, "11.3.0.1", "is for sm80 (A100)"),
    ],
)
def test_an_engine_fits_or_not(record: EngineRecord, card: Card, version: str, expected: str | None) -> None:
    found = refusal(record, card, version)
    assert (found is None) == (expected is None) and (expected or "") in (found or "")


def test_the_best_engine_that_fits_is_taken(tmp_path: Path) -> None:
    records = [
        full("general.engine", compatibility="ampere+"), full("same.engine", compatibility="same-cc"),
        full("other.engine", gpu="NVIDIA A30"), full("old.engine", version="11.1.0.1"), full("ours.engine"),
        full("lean.engine", version_compatible=True), full("h100.engine", targets=("sm90",)),
    ]
    bundle = make_bundle(tmp_path / "b", *records)
    order = []
    while any(refusal(record, A100, FULL) is None for record in bundle.manifest.engines):
        best = choose_record(bundle, "tensorrt", A100, FULL)
        order.append(best.file.removesuffix(".engine"))
        left = tuple(record for record in bundle.manifest.engines if record != best)
        bundle = Bundle(bundle.path, make_manifest(engines=left, files=bundle.manifest.files))
    assert order == ["ours", "lean", "same", "general", "other"]
    text = sentence(lambda: choose_record(bundle, "tensorrt", A100, FULL))
    assert "old.engine was built with TensorRT 11.1.0.1" in text and "h100.engine is for sm90 (H100, H200)" in text


def test_without_a_card(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(card=None)
    bundle = make_bundle(tmp_path / "b", make_engine(), make_engine("v.engine", targets=("sm89", "sm120")))
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert text.startswith("this machine has no CUDA device; the bundle's TensorRT for RTX engines are for sm80 (A100)")
    assert "sm89 (L40, RTX 4090), sm120 (RTX 5090): run the bundle" in text and "--engine onnxruntime" in text
    one = make_bundle(tmp_path / "one", make_engine())
    text = sentence(lambda: open_bundle("tensorrt-rtx", one, OpenOptions()))
    assert "the bundle's TensorRT for RTX engine is for sm80 (A100)" in text
    assert "but no CUDA device" in sentence(lambda: probe("tensorrt-rtx"))
    assert not fake.state.deserialised


def test_a_bundle_without_such_an_engine(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", full())
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert f"holds no tensorrt-rtx engine; earlytom-build {bundle.path} --engine tensorrt-rtx adds one" in text


def test_nothing_is_deserialised_that_does_not_fit(tmp_path: Path, machine: Callable[..., None]) -> None:
    bundle = make_bundle(tmp_path / "b", make_engine())
    for card, version, said, built in (
        (H100, RTX, "is for sm80 (A100)", "--engine tensorrt --for sm90"),
        (A100, "1.8.0", "was built with", "--engine tensorrt-rtx --for sm80"),
    ):
        machine(card, version=version)
        text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
        assert said in text and text.endswith(f"this builds one that fits: earlytom-build {bundle.path} {built}")
        assert not fake.state.deserialised


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "not listed"])
def test_an_engine_of_unknown_origin_is_never_deserialised(
    tmp_path: Path, machine: Callable[..., None], damage: str
) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    path = bundle.path / FILE
    if damage == "changed":
        path.write_bytes(path.read_bytes().replace(b"frames", b"Frames"))
    elif damage == "shorter":
        path.write_bytes(b"{}")
    elif damage == "missing":
        path.unlink()
    else:
        files = {name: record for name, record in bundle.manifest.files.items() if name != FILE}
        bundle = Bundle(bundle.path, make_manifest(engines=bundle.manifest.engines, files=files))
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()), BundleError)
    assert FILE in text and not fake.state.deserialised


def test_the_library_is_asked_about_the_header(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    fake.state.validity = (fake.EngineValidity["INVALID"], 6)
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert "does not hold code for this card and the driver is too old" in text and "--for sm80" in text
    assert not fake.state.deserialised
    fake.state.validity = (fake.EngineValidity["SUBOPTIMAL"], 16)
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()


def test_an_engine_that_the_library_cannot_load(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine(), content=b"not an engine")
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert "cannot load vision.sm80.rtx.engine" in text and "magic tag does not match" in text
    assert f"built anew: earlytom-build {bundle.path} --engine" in text


def test_host_code_runs_only_where_the_manifest_says_so(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(product="tensorrt", version=FULL)
    manifest = make_manifest()
    code = fake.plan(manifest.inputs, manifest.outputs, host_code=True)
    plain = make_bundle(tmp_path / "plain", full(), content=code)
    assert "host code is not allowed" in sentence(lambda: open_bundle("tensorrt", plain, OpenOptions()))
    announced = make_bundle(tmp_path / "announced", full(version_compatible=True), content=code)
    open_bundle("tensorrt", announced, OpenOptions()).close()


def test_stripped_engines_get_their_weights_back(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(product="tensorrt", version=FULL)
    manifest = make_manifest()
    content = fake.plan(manifest.inputs, manifest.outputs, stripped=True)
    bundle = make_bundle(tmp_path / "b", full(settings=BuildSettings(1 << 30, strip_weights=True)), content=content)
    open_bundle("tensorrt", bundle, OpenOptions()).close()
    assert fake.state.refitted == [str(bundle.path / "vision.onnx")]
    (bundle.path / "vision.onnx").write_bytes(b"GRAPH")
    assert "damaged" in sentence(lambda: open_bundle("tensorrt", bundle, OpenOptions()), BundleError)


def test_another_engine_than_announced(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    other = make_manifest(dtype="fp16")
    bundle = make_bundle(tmp_path / "b", make_engine(), content=fake.plan(other.inputs, other.outputs[:-1]))
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert "tokens float32 [1, 17, 24] is HALF [1, 17, 24]; weights float32 [1, 4, 8] is missing" in text


def test_devices_that_cannot_be() -> None:
    assert "must be cuda" in sentence(lambda: tensorrt_run._cuda_device("cpu", A100))
    if not torch.cuda.is_available():
        text = sentence(lambda: tensorrt_run._cuda_device(None, A100))
        assert text.startswith(f"the machine has a {A100.name}, but torch {torch.__version__} cannot use it")


# ---- the command that rebuilds

LARGE = VisionGeometry()


def large(*records: EngineRecord) -> Bundle:
    manifest = Manifest.derive(
        preset("videomme", 0.2), LARGE, dtype="fp16", opset=20, attention="primitives", checkpoint=CHECKPOINT, tools={},
        engines=records,
    )
    return Bundle(Path("/bundles/a b"), manifest)


def typed(command: str) -> tuple[Path, EngineOptions]:
    """The bundle and the options of an `earlytom-build` as its parser reads them."""
    words = shlex.split(command)
    assert words[0] == "earlytom-build"
    arguments = build_parser().parse_args(words[1:])
    return arguments.bundle, filled(EngineOptions, arguments)


def test_the_command_adds_an_engine_for_this_card() -> None:
    bundle = large(make_engine())
    assert typed(rebuild_command(bundle, "tensorrt-rtx", "sm89")) == (
        Path("/bundles/a b"), EngineOptions(engine="tensorrt-rtx", targets="sm89")
    )


def test_the_command_builds_anew_for_all_cards_that_another_version_built_for() -> None:
    bundle = large(make_engine("a.engine"), make_engine("b.engine", targets=("sm80", "sm89")))
    _, options = typed(rebuild_command(bundle, "tensorrt-rtx", "sm89"))
    assert options == EngineOptions(engine="tensorrt-rtx", targets="sm80,sm89")


def test_the_command_keeps_how_the_engine_was_built() -> None:
    settings = BuildSettings(1 << 30, 4, strip_weights=True)
    record = full(compatibility="ampere+", version_compatible=True, settings=settings)
    _, options = typed(rebuild_command(large(record), "tensorrt", "sm90"))
    assert options == EngineOptions(
        engine="tensorrt", targets="sm90", hardware_compatibility="ampere+", version_compatible=True,
        strip_weights=True, optimization_level=4,
    )


def test_a_card_that_the_product_does_not_build_for_gets_the_other_one() -> None:
    _, options = typed(rebuild_command(large(make_engine()), "tensorrt-rtx", "sm90"))
    assert options == EngineOptions(engine="tensorrt", targets="sm90")


def test_unknown_targets_are_shown_as_they_are() -> None:
    assert show_targets(("sm80", "sm999")) == "sm80 (A100), sm999"


# ---- running


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def runner(request: pytest.FixtureRequest, tmp_path: Path, machine: Callable[..., None]) -> TensorRTRunner:
    product = request.param
    machine(product=product, version=FULL if product == "tensorrt" else RTX)
    bundle = make_bundle(tmp_path / "b", full() if product == "tensorrt" else make_engine())
    opened = open_bundle(product, bundle, OpenOptions())
    assert isinstance(opened, TensorRTRunner)
    return opened


def test_it_runs_from_wherever_the_frames_are(runner: TensorRTRunner) -> None:
    clip = frames()
    read_only = clip.numpy().copy()
    read_only.setflags(write=False)
    flipped = clip.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    room = torch.zeros(clip.numel() + 1, dtype=torch.uint8)
    room[1:] = clip.flatten()
    for given in (clip, clip.numpy(), read_only, flipped, room[1:].view(clip.shape)):
        outputs = runner.run(given)
        torch.testing.assert_close(outputs.tokens, expected(clip))
        assert outputs.positions.dtype == torch.int64 and outputs.dynamic.dtype == torch.bool


def test_outputs_belong_to_the_caller(runner: TensorRTRunner) -> None:
    first = runner.run(frames(1))
    kept = first.tokens.clone()
    runner.run(frames(2)).tokens.zero_()
    assert torch.equal(first.tokens, kept)


def test_every_input_is_checked(runner: TensorRTRunner) -> None:
    for wrong in (frames()[0], frames().float(), np.zeros((1, 8, 28, 28, 3), np.uint8), None):
        assert "the engine takes frames" in sentence(lambda wrong=wrong: runner.run(wrong), InputError)


def test_inference_mode_does_not_stick_to_the_buffers(runner: TensorRTRunner) -> None:
    with torch.inference_mode():
        runner._pool._free.clear()  # as if all were in use: this call makes a context
        runner.run(frames(1))
    assert all(slot.captured == (runner.name == "tensorrt") for slot in runner._pool.slots)
    torch.testing.assert_close(runner.run(frames(2)).tokens, expected(frames(2)))


def test_it_says_what_it_is(runner: TensorRTRunner) -> None:
    assert runner.thread_safe and runner.why.endswith("CUDA graph") and A100.name in runner.why
    assert runner.device_memory_bytes == 1000 + frames().numel() + 17 * 24 * 4 + 16 * 8 + 4 + 4 * 8 * 4
    assert probe(runner.name).endswith("on NVIDIA A100-SXM4-80GB (sm80)")


def test_closing(runner: TensorRTRunner) -> None:
    with runner:
        pass
    runner.close()
    assert "was closed: open it again" in sentence(lambda: runner.run(frames()))


@pytest.mark.parametrize("end", ["closed", "closed in use", "dropped"])
def test_contexts_go_before_what_they_need(runner: TensorRTRunner, end: str) -> None:
    """The bindings keep a context's engine alive, not its configuration and cache; the library does not forgive it."""
    if end == "closed":
        runner.close()
    elif end == "closed in use":
        with runner._pool.take() as slot:
            runner.close()
            with tensorrt_context.cuda.device(None):
                slot.run(frames())
        del slot
    runner.__dict__.clear() if end == "dropped" else None
    gc.collect()
    assert not fake.state.faults


def test_a_call_that_fails_half_way_is_waited_for(runner: TensorRTRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    (slot,) = runner._pool.slots
    recorded: list[Any] = []
    monkeypatch.setattr(slot._done, "record", recorded.append)

    def no_memory(self: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.cuda.OutOfMemoryError):
        patch.setattr(torch.Tensor, "clone", no_memory)
        runner.run(frames())
    assert len(recorded) == 1
    torch.testing.assert_close(runner.run(frames()).tokens, expected(frames()))


def test_tensorrt_captures_once_and_replays(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine(product="tensorrt", version=FULL)
    bundle = make_bundle(tmp_path / "b", full())
    runner = open_bundle("tensorrt", bundle, OpenOptions())
    assert isinstance(runner, TensorRTRunner) and runner.replays_graph
    assert (fake.state.enqueued, fake.state.replayed) == (1, 0)  # the warm-up, without which capturing fails
    answers = [runner.run(frames(seed)) for seed in range(3)]
    assert (fake.state.enqueued, fake.state.replayed) == (1, 3)
    plain = open_bundle("tensorrt", bundle, OpenOptions(cuda_graph=False))
    assert plain.why.endswith("no CUDA graph")
    for seed, answer in enumerate(answers):
        assert all(torch.equal(a, b) for a, b in zip(answer, plain.run(frames(seed))))
    assert fake.state.replayed == 3
    fake.state.fail = True
    assert "the engine failed: it does not say why" in sentence(lambda: plain.run(frames()))


def test_what_cannot_be_captured_runs_without_a_graph(
    tmp_path: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(product="tensorrt", version=FULL)
    fake.state.refuse_capture = True
    runner = open_bundle("tensorrt", make_bundle(tmp_path / "b", full()), OpenOptions())
    assert "without CUDA graph, which could not be captured (operation not permitted" in runner.why
    assert tensorrt_context.cuda.current_stream().cuda_stream == 0, "the caller's stream is as it was"
    torch.testing.assert_close(runner.run(frames()).tokens, expected(frames()))


@pytest.mark.parametrize("graph", [True, False])
def test_rtx_has_its_own_strategy(tmp_path: Path, machine: Callable[..., None], graph: bool) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    runner = open_bundle("tensorrt-rtx", bundle, OpenOptions(cuda_graph=graph))
    assert fake.state.strategies == ["WHOLE_GRAPH_CAPTURE" if graph else "DISABLED"]
    assert isinstance(runner, TensorRTRunner)
    (slot,) = runner._pool.slots
    for seed in range(3):
        clip = frames(seed)
        torch.testing.assert_close(runner.run(clip).tokens, expected(clip))
    assert fake.state.replayed == 0
    if graph:
        assert slot.context.told == len(slot.context.addresses), "addresses that stay are told once"


def test_threads_share_a_bounded_pool(tmp_path: Path, machine: Callable[..., None]) -> None:
    for product, version, record in (("tensorrt", FULL, full()), ("tensorrt-rtx", RTX, make_engine())):
        machine(product=product, version=version)
        fake.state.delay = 0.002
        bundle = make_bundle(tmp_path / product, record)
        clips = [frames(seed) for seed in range(4)] * 6
        with open_bundle(product, bundle, OpenOptions(contexts=2)) as runner, ThreadPoolExecutor(6) as pool:
            for clip, outputs in zip(clips, pool.map(runner.run, clips)):
                torch.testing.assert_close(outputs.tokens, expected(clip))
        assert fake.state.most == fake.state.contexts == 2


def test_a_card_without_room_for_a_second_context_serves_all_with_one(
    tmp_path: Path, machine: Callable[..., None]
) -> None:
    machine()
    fake.state.room, fake.state.delay = 1, 0.002
    bundle = make_bundle(tmp_path / "b", make_engine())
    with open_bundle("tensorrt-rtx", bundle, OpenOptions(contexts=4)) as runner, ThreadPoolExecutor(4) as pool:
        list(pool.map(runner.run, [frames()] * 12))
    assert fake.state.contexts == 1
    text = sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions()))
    assert "cannot be given memory to run in" in text
    assert "at least 1" in sentence(lambda: open_bundle("tensorrt-rtx", bundle, OpenOptions(contexts=0)))


def test_closing_while_others_wait(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    runner = open_bundle("tensorrt-rtx", bundle, OpenOptions(contexts=1))
    assert isinstance(runner, TensorRTRunner)
    said: list[str] = []
    with runner._pool.take():
        waiting = threading.Thread(target=lambda: said.append(sentence(lambda: runner.run(frames()))))
        waiting.start()
        runner.close()
        waiting.join(10)
    assert said == ["the engine was closed: open it again"]


# ---- the kept kernels


def test_kernels_are_kept_and_read_back(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()
    path = bundle.path / f"{FILE}.1.7.1.nvidia-a100-sxm4-80gb.sm80.cache"
    assert path == cache_path(bundle.path / FILE, RTX, A100)
    written = path.read_bytes()
    assert written.endswith(b"kernels of this card")
    before = path.stat().st_mtime_ns
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()
    assert path.stat().st_mtime_ns == before, "nothing new was compiled"
    read_bundle(bundle.path)  # tolerates it
    with BundleWriter(bundle.path, force=True) as writer:  # and does not stand in the way of a new export
        (writer.path / "vision.onnx").write_bytes(b"graph")
        writer.commit(make_manifest())
    assert not path.exists()


def test_what_verifying_compiles_is_not_part_of_the_bundle(tmp_path: Path, machine: Callable[..., None]) -> None:
    machine()
    manifest = make_manifest(engines=(make_engine(),))
    with BundleWriter(tmp_path / "b") as writer:
        (writer.path / "vision.onnx").write_bytes(b"graph")
        (writer.path / FILE).write_bytes(fake.plan(manifest.inputs, manifest.outputs))
        files = {FILE: digest_file(writer.path / FILE)}
        unfinished = Bundle(writer.path, make_manifest(engines=manifest.engines, files=files))
        open_bundle("tensorrt-rtx", unfinished, OpenOptions()).close()
        assert cache_path(writer.path / FILE, RTX, A100).exists()
        bundle = writer.commit(manifest)
    assert set(bundle.manifest.files) == {"vision.onnx", FILE}
    assert {entry.name for entry in bundle.path.iterdir()} == {"vision.onnx", FILE, "manifest.json"}
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()
    cache_path(bundle.path / FILE, RTX, A100).write_bytes(b"of another driver")
    read_bundle(bundle.path)


@pytest.mark.parametrize("damage", [b"", b"garbage", None, "flip"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, machine: Callable[..., None], damage: Any) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    path = cache_path(bundle.path / FILE, RTX, A100)
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()
    good = path.read_bytes()
    path.write_bytes(good[:-1] if damage is None else good[:-1] + b"!" if damage == "flip" else damage)
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).close()
    assert path.read_bytes() == good


def test_a_cache_of_another_engine_is_not_read(tmp_path: Path) -> None:
    file = CacheFile(tmp_path / "c", "aa" * 32)
    assert file.read() is None and file.write(b"kernels") and file.read() == b"kernels"
    assert CacheFile(tmp_path / "c", "bb" * 32).read() is None


def test_a_cache_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CacheFile(tmp_path / "c", "aa" * 32)
    file.write(b"old")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("earlytom.files.os.fsync", full_disk)
    assert not file.write(b"new")
    assert file.read() == b"old" and [p.name for p in tmp_path.iterdir()] == ["c"]
    assert not CacheFile(tmp_path / "none" / "c", "aa" * 32).write(b"x")


def test_a_bundle_that_cannot_be_written_to_still_runs(
    tmp_path: Path, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    bundle = make_bundle(tmp_path / "b", make_engine())
    monkeypatch.setattr(CacheFile, "write", lambda self, payload: False)
    open_bundle("tensorrt-rtx", bundle, OpenOptions()).run(frames())


# ---- the fake against the real thing

USED: dict[str, tuple[str, ...]] = {
    "Runtime": ("deserialize_cuda_engine", "get_engine_validity"),
    "ICudaEngine": ("get_tensor_name", "get_tensor_dtype", "get_tensor_mode", "get_tensor_shape",
                    "create_runtime_config", "create_execution_context"),
    "IExecutionContext": ("set_tensor_address", "execute_async_v3"),
    "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
    "IRuntimeCache": ("serialize", "deserialize", "reset"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine"),
    "OnnxParserRefitter": ("refit_from_file",),
}


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt"])
def test_the_fake_has_the_bindings_signatures(package: str) -> None:
    real = pytest.importorskip(package)
    for owner, methods in USED.items():
        if package == "tensorrt" and owner == "IRuntimeCache":
            continue
        for method in methods:
            if package == "tensorrt" and method in ("get_engine_validity", "create_runtime_cache", "set_runtime_cache"):
                continue
            documented = getattr(getattr(real, owner), method).__doc__
            taken = [re.findall(r"(\w+): ", line) for line in documented.splitlines() if re.match(r".*\(self: ", line)]
            ours = getattr(getattr(fake, owner), method).__code__
            names = list(ours.co_varnames[: ours.co_argcount])
            assert names in taken, f"{owner}.{method}: {names} against {taken}"
    for owner, attribute in (("ICudaEngine", "device_memory_size_v2"), ("ICudaEngine", "num_io_tensors"),
                             ("Runtime", "engine_host_code_allowed")):
        assert isinstance(getattr(getattr(real, owner), attribute), property)
    for name in fake.NAMES.values():
        assert hasattr(real.DataType, name)
    if package == "tensorrt_rtx":
        assert isinstance(real.IRuntimeConfig.cuda_graph_strategy, property)
        assert {s.name for s in fake.CudaGraphStrategy} == set(real.CudaGraphStrategy.__members__)
        flags = {flag.name: int(flag) for flag in fake.EngineInvalidityDiagnostics}
        assert flags == {name: int(f) for name, f in real.EngineInvalidityDiagnostics.__members__.items()}
        assert OBJECTIONS.keys() == flags.keys()


@pytest.mark.parametrize("version", ["10.15.1.29", "11.2.1.2"])
def test_the_fake_has_the_recorded_signatures_of_the_full_product(version: str) -> None:
    classes = RECORDS[version]["classes"]
    for owner in ("Runtime", "Refitter", "OnnxParserRefitter"):
        for method in USED[owner]:
            if method == "get_engine_validity":
                assert method not in classes[owner]["methods"]
                continue
            ours = getattr(getattr(fake, owner), method).__code__
            assert list(ours.co_varnames[1 : ours.co_argcount]) in classes[owner]["methods"][method]
    assert "engine_host_code_allowed" in classes["Runtime"]["attributes"]
