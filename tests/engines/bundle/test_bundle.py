"""The bundle: what is written is what is read, anything else is refused in one sentence, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlytom.config import ATTENTION_FORMS, EarlyTomConfig, InnerMerging
from earlytom.errors import BundleError, ConfigError, ExportError
from earlytom.parity import HopReport
from earlytom.parity.results import STATES
from earlytom.vision.geometry import VisionGeometry
from engines.bundle import writer as module
from engines.bundle.manifest import BuildSettings, EngineRecord, FileRecord, Inspection, Manifest, request_key
from engines.bundle.reader import Bundle, find_same, read_bundle
from engines.bundle.writer import BundleWriter, update_bundle

GEOMETRY = VisionGeometry(56, 14, 16, 2, 32, 3, projector_size=24)
CONFIG = EarlyTomConfig(retain=0.5, frames=8, merge_layers=(0, 2))
CHECKPOINT = {"name": "demo", "format": "hf", "digest": "00"}


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "dtype": "fp32", "opset": 18, "attention": "primitives", "checkpoint": CHECKPOINT, "tools": {"torch": "2.15"},
        "traced": ("stage_0",), "request_key": request_key({"retain": 0.5}),
    }
    return Manifest.derive(CONFIG, GEOMETRY, **(values | changes))


def make_engine(file: str = "vision.sm80.rtx.engine", **changes: Any) -> EngineRecord:
    values: dict[str, Any] = {
        "product": "tensorrt-rtx", "version": "1.7.1", "targets": ("sm80",), "compatibility": "none",
        "version_compatible": False, "gpu": None, "driver": None, "cuda": None, "settings": BuildSettings(1 << 30),
    }
    return EngineRecord(file, **(values | changes))


def write(output: Path, content: bytes = b"graph", *, force: bool = False, **changes: Any) -> Bundle:
    with BundleWriter(output, force=force) as writer:
        (writer.path / "vision.onnx").write_bytes(content)
        (writer.path / "vision.onnx.data").write_bytes(b"\0" * 1000)
        return writer.commit(make_manifest(**changes))


def sign(body: dict[str, Any]) -> bytes:
    """A manifest.json with whatever is in `body` and a digest that fits: an independent statement of the format."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def body_of(manifest: Manifest) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(manifest.to_json())
    del body["manifest_sha256"]
    return body


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(BundleError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


# ---- the manifest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(st.text(max_size=8), json_values, max_size=3)
file_names = st.from_regex(r"[a-z][a-z0-9.]{0,10}\.bin", fullmatch=True)
short = st.text(max_size=8)
hops = st.builds(
    HopReport, short, short, short, st.sampled_from(STATES), st.lists(short, max_size=2).map(tuple),
    bisect=st.none() | short, note=short, repeat=short,
)
HOP = HopReport("static", "onnxruntime", "fp32", "not run", ("there is none",))
words = st.lists(short, max_size=2).map(tuple)
looks = st.builds(
    Inspection, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), words, words,
    st.lists(st.tuples(short, short), max_size=2).map(tuple), words,
)
built = st.builds(
    BuildSettings, st.integers(1, 2**40), st.none() | st.integers(0, 5), st.booleans(), st.booleans(), st.booleans(),
    st.none() | looks,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    frames = draw(st.integers(4, 16))
    config = EarlyTomConfig(
        retain=draw(st.floats(0.3, 0.6)), frames=frames, tau=draw(st.floats(-1, 1)),
        merge_layers=draw(st.sampled_from([(0,), (0, 2), (0, 1, 2)])),
        newline=draw(st.sampled_from(["grid", "one_token", "no_token"])),
        inner=draw(st.none() | st.builds(InnerMerging, st.integers(1, 9), st.floats(0, 0.9))),
    )
    names = draw(st.lists(file_names, max_size=3, unique=True))
    return Manifest.derive(
        config, GEOMETRY, dtype=draw(st.sampled_from(["fp32", "fp16", "bf16"])), batch=draw(st.integers(1, 3)),
        opset=draw(st.integers(18, 23)), attention=draw(st.sampled_from(ATTENTION_FORMS)),
        traced=tuple(draw(st.lists(short, max_size=3))),
        checkpoint=draw(objects) | {"name": draw(short), "format": draw(short), "digest": draw(short)},
        tools=draw(st.dictionaries(short, short, max_size=2)), parity=tuple(draw(st.lists(hops, max_size=2))),
        files={name: FileRecord(draw(short), draw(st.integers(0, 2**40))) for name in names},
        engines=tuple(make_engine(name, gpu=draw(st.none() | short), settings=draw(built)) for name in names[:2]),
    )


@settings(max_examples=60)
@given(manifests())
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text  # the same bytes, whatever the order in which things were put in


def test_the_manifest_is_plain_sorted_json_without_a_date() -> None:
    body = json.loads(make_manifest().to_json())
    assert list(body) == sorted(body)
    assert body["counts"] == {"frames_left": 4, "patches_kept": 4, "visual_tokens": 16, "newlines": 1, "tokens": 17}
    assert body["inputs"] == [{"name": "frames", "dtype": "uint8", "shape": [1, 8, 56, 56, 3]}]
    assert body["outputs"][0] == {"name": "tokens", "dtype": "float32", "shape": [1, 17, 24]}
    assert sign(body_of(make_manifest())) and Manifest.from_json(sign(body_of(make_manifest()))) == make_manifest()


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda b: b.update(colour="red"), "manifest has unknown colour"),
    "unknown keys deep": (lambda b: b["counts"].update(a=1, b=2), "manifest.counts has unknown a, unknown b"),
    "missing key": (lambda b: b.pop("opset"), "manifest has no opset"),
    "missing key of a setting": (lambda b: b["config"].pop("tau"), "manifest.config has no tau"),
    "text for a number": (lambda b: b.update(opset="18"), "manifest.opset is '18', it must be int"),
    "true for a number": (lambda b: b.update(batch=True), "manifest.batch is True, it must be int"),
    "a number for a list": (lambda b: b.update(engines=3), "manifest.engines is 3, it must be a list"),
    "a list for an object": (lambda b: b.update(files=[]), "manifest.files is [], it must be an object"),
    "a number for an object": (lambda b: b.update(geometry=1), "manifest.geometry is 1, it must be an object"),
    "wrong inside a list": (lambda b: b["outputs"][1].update(shape=[1, "4"]), "manifest.outputs[1].shape[1] is '4'"),
    "an impossible setting": (lambda b: b["config"].update(retain=1.5), "manifest.config: retain is 1.5"),
    "settings that do not fit": (lambda b: b["config"].update(merge_layers=[0, 7]), "merge layer 7 does not exist"),
    "another shape": (lambda b: b["outputs"][0].update(shape=[1, 18, 24]), "outputs (tokens float32 [1, 18, 24]"),
    "another dtype": (lambda b: b.update(dtype="fp16"), "which gives tokens float16"),
    "no such dtype": (lambda b: b.update(dtype="int8"), "dtype is 'int8', it must be one of fp32, fp16, bf16"),
    "other counts": (lambda b: b["counts"].update(tokens=1), "counts (TokenCounts("),
    "an anonymous checkpoint": (lambda b: b["checkpoint"].pop("digest"), "checkpoint's identity lacks digest"),
    "a path for a file": (lambda b: b["files"].update({"../x": {"sha256": "", "bytes": 0}}), "lists '../x'"),
    "an engine without file": (lambda b: b["engines"].append(engine_body()), "but not its file"),
    "an engine of nobody": (lambda b: b["engines"].append(engine_body(product="tvm")), "product is 'tvm'"),
    "an engine for nothing": (lambda b: b["engines"].append(engine_body(targets=[])), "targets are []"),
    "two engines in one file": (lambda b: b.update(engines=[engine_body()] * 2), "share a file"),
    "version 0": (lambda b: b.update(version=0), "version 0 is not known"),
    "version 1.0": (lambda b: b.update(version=1.0), "it is not the manifest of a bundle"),
}


def engine_body(**changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(make_engine()) | {"targets": ["sm80"]} | changes


@pytest.mark.parametrize("case", EDITS)
def test_a_manifest_that_is_signed_but_wrong_is_refused_by_name(case: str) -> None:
    edit, expected = EDITS[case]
    body = body_of(make_manifest())
    edit(body)
    assert expected in refusal(lambda: Manifest.from_json(sign(body)))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":2}', b"9" * 5000]
)
def test_garbage_is_refused(text: bytes) -> None:
    refusal(lambda: Manifest.from_json(text))


def test_a_key_that_is_there_twice_is_refused() -> None:
    """A reader that takes the last one finds the digest right; another reader would see the first."""
    text = make_manifest().to_json().replace("{", '{"opset": 23,', 1)
    assert "a key appears twice" in refusal(lambda: Manifest.from_json(text))


def test_a_newer_manifest_says_what_to_do() -> None:
    text = sign({"version": 7, "whatever": "it holds"})
    assert "has version 7 and this program reads version 1: upgrade" in refusal(lambda: Manifest.from_json(text))


def test_what_json_cannot_hold_is_refused_when_it_is_made() -> None:
    said = refusal(lambda: make_manifest(checkpoint=CHECKPOINT | {"error": float("nan")}))
    assert "the checkpoint's identity cannot be written as JSON" in said


def test_settings_of_an_engine_as_earlier_versions_wrote_them() -> None:
    """They were a dictionary, with what was seen in the engine where somebody looked."""
    seen = {"kernels": 3, "attention": 2, "fused": 1, "unfused": ["vision.layers.1.attention"], "warnings": [],
            "fused_kernels": ["mha"], "other_types": [["vision.fc/MatMul", "float32"]]}
    settings = {"workspace": 4 << 30, "optimization_level": None, "strip_weights": True, "detailed": True}
    settings |= {"tf32": False}
    expected = BuildSettings(4 << 30, strip_weights=True)
    looked = Inspection(3, 2, 1, ("vision.layers.1.attention",), ("mha",), (("vision.fc/MatMul", "float32"),), ())
    body = body_of(make_manifest(engines=(make_engine(),), files={make_engine().file: FileRecord("", 1)}))
    cases: list[Any] = [({}, None), ({"inspected": seen}, looked)]
    for more, inspected in cases:
        body["engines"][0]["settings"] = settings | more
        (engine,) = Manifest.from_json(sign(body)).engines
        assert engine.settings == dataclasses.replace(expected, inspected=inspected)
    del body["engines"][0]["settings"]["tf32"]
    assert "manifest.engines[0].settings has no tf32" in refusal(lambda: Manifest.from_json(sign(body)))


def test_inner_merging_as_earlier_versions_wrote_it() -> None:
    """Before it could be as released."""
    inner = InnerMerging(2, 0.25)
    body = body_of(replace(make_manifest(), config=replace(CONFIG, inner=inner)))
    del body["config"]["inner"]["as_released"]
    assert Manifest.from_json(sign(body)).config.inner == inner
    body["config"]["inner"]["as_released"] = True
    released = Manifest.from_json(sign(body)).config.inner
    assert released is not None and released.as_released


def test_the_request_key_depends_on_the_request_alone() -> None:
    assert request_key({"a": 1, "b": [2]}) == request_key({"b": (2,), "a": 1}) != request_key({"a": 1, "b": [3]})


# ---- reading


def test_a_bundle_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path / "b")
    for path in (tmp_path / "b", str(tmp_path / "b")):
        assert read_bundle(path) == written
    assert written.file("vision.onnx").read_bytes() == b"graph"
    assert written.manifest.files["vision.onnx"] == FileRecord(hashlib.sha256(b"graph").hexdigest(), 5)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert sorted(os.listdir(tmp_path)) == ["b"]
    assert write(tmp_path / "c").path.joinpath("manifest.json").read_bytes() == written.path.joinpath(
        "manifest.json"
    ).read_bytes()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def spoil_manifest(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace('"opset": 18', '"opset": 19'))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle: it has no manifest.json"),
    "garbage": (lambda b: (b / "manifest.json").write_bytes(b"\x00\xff"), "is refused: it is damaged"),
    "half a manifest": (lambda b: os.truncate(b / "manifest.json", 500), "is refused: it is damaged"),
    "edited manifest": (spoil_manifest, "was edited after it was written"),
    "missing": (lambda b: (b / "vision.onnx").unlink(), "vision.onnx is missing"),
    "truncated": (lambda b: os.truncate(b / "vision.onnx.data", 10), "vision.onnx.data has 10 bytes where"),
    "changed": (lambda b: (b / "vision.onnx").write_bytes(b"grapH"), "vision.onnx was changed (SHA-256)"),
    "all at once": (
        lambda b: [(b / "vision.onnx").unlink(), os.truncate(b / "vision.onnx.data", 0)],
        "vision.onnx is missing; vision.onnx.data has 0 bytes",
    ),
    "a directory for a file": (
        lambda b: [(b / "vision.onnx").unlink(), (b / "vision.onnx").mkdir()], "vision.onnx is missing"
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bundle_is_refused(tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGE[case]
    write(tmp_path / "b")
    damage(tmp_path / "b")
    text = refusal(lambda: read_bundle(tmp_path / "b"))
    assert expected in text and str(tmp_path / "b") in text
    if case != "changed":
        refusal(lambda: read_bundle(tmp_path / "b", check=False))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(lambda: read_bundle(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(lambda: read_bundle(tmp_path / "file"))
    assert "is not a bundle" in refusal(lambda: read_bundle(tmp_path))


def test_without_check_content_is_hashed_when_it_is_used(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / "vision.onnx").write_bytes(b"grapH")
    bundle = read_bundle(tmp_path / "b", check=False)
    bundle.verify("vision.onnx.data")
    refusal(lambda: bundle.verify("vision.onnx"))


def test_a_file_that_the_manifest_does_not_list_is_never_used(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / "vision.sm90.engine").write_bytes(b"from somewhere")
    bundle = read_bundle(tmp_path / "b")
    assert "has no vision.sm90.engine in its manifest" in refusal(lambda: bundle.file("vision.sm90.engine"))
    refusal(lambda: bundle.file("../b/vision.onnx"))


# ---- writing


def test_the_same_request_is_recognised(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    assert find_same(tmp_path / "b", bundle.manifest.request_key) == bundle
    assert find_same(tmp_path / "b", "other") is None
    assert find_same(tmp_path / "none", bundle.manifest.request_key) is None
    (tmp_path / "b" / "vision.onnx").unlink()
    assert find_same(tmp_path / "b", bundle.manifest.request_key) is None
    assert find_same(write(tmp_path / "c", request_key="").path, "") is None


def test_force_replaces_a_bundle_and_only_that(tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()  # an empty directory is as good as none
    write(out)
    assert "--force replaces it" in refusal(lambda: write(out, b"new"))
    assert read_bundle(write(out, b"new", force=True).path).file("vision.onnx").read_bytes() == b"new"
    spoil_manifest(out)
    (out / "vision.sm80.engine").write_bytes(b"left by an update that was killed")
    write(out, b"newer", force=True)
    assert sorted(os.listdir(out)) == ["manifest.json", "vision.onnx", "vision.onnx.data"]
    assert sorted(os.listdir(tmp_path)) == ["b"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_bundle_is_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    assert "not an earlier bundle" in refusal(lambda: write(tmp_path / "home", force=force))
    (tmp_path / "home" / "manifest.json").write_text('{"name": "a browser extension", "files": {}}')
    assert "not an earlier bundle" in refusal(lambda: write(tmp_path / "home", force=force))
    assert "is a file" in refusal(lambda: write(tmp_path / "home" / "thesis.tex", force=force))
    assert "mount point" in refusal(lambda: write(Path("/proc"), force=force))
    assert sorted(os.listdir(tmp_path / "home")) == ["manifest.json", "thesis.tex"]


def test_force_spares_what_somebody_put_into_a_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    assert "files of somebody else (notes.txt)" in refusal(lambda: write(tmp_path / "b", force=True))


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "x" / "b", Path("/proc/none/b")):
        assert "is not writable" in refusal(lambda output=output: write(output))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir(mode=0o500)
    assert "is not writable (Permission denied)" in refusal(lambda: write(tmp_path / "p" / "b"))


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    write(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "link").is_symlink() and read_bundle(tmp_path / "disk")
    assert read_bundle(tmp_path / "link").file("vision.onnx").read_bytes() == b"new"


def test_only_plain_files_are_committed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a plain file"), BundleWriter(tmp_path / "b") as writer:
        (writer.path / "folder").mkdir()
        writer.commit(make_manifest())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, ConfigError("x"), MemoryError, None])
@pytest.mark.parametrize("earlier", [False, True])
def test_leaving_early_leaves_nothing(tmp_path: Path, error: Any, earlier: bool) -> None:
    out = tmp_path / "new" / "deep" / "b"
    if earlier:
        write(out, b"old")
    before = sorted(tmp_path.rglob("*"))
    expected = pytest.raises(error if isinstance(error, type) else type(error)) if error else nullcontext()
    with expected, BundleWriter(out, force=True) as writer:
        (writer.path / "vision.onnx").write_bytes(b"half")
        if error:
            raise error
    assert sorted(tmp_path.rglob("*")) == before
    assert not earlier or read_bundle(out).file("vision.onnx").read_bytes() == b"old"


@pytest.mark.parametrize("fail_at", range(2))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_an_interrupt_while_the_new_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException
) -> None:
    """The old bundle is moved away, the new one in: whichever of the two moves fails, the old one is whole."""
    write(tmp_path / "b", b"old")
    calls = []
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fail_at + 1:
            if isinstance(error, OSError):
                error.filename = str(source)
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt):
        write(tmp_path / "b", b"new", force=True)
    assert os.listdir(tmp_path) == ["b"]
    assert read_bundle(tmp_path / "b").file("vision.onnx").read_bytes() == b"old"


def test_an_interrupt_after_the_move_keeps_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b", b"old")
    sync = module.sync

    def interrupted(path: Path) -> None:
        if path == tmp_path:
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(module, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "b", b"new", force=True)
    assert os.listdir(tmp_path) == ["b"]
    assert read_bundle(tmp_path / "b").file("vision.onnx").read_bytes() == b"new"


def test_two_exports_to_one_place(tmp_path: Path) -> None:
    """The second one to finish is refused, the first one's bundle is whole."""
    with pytest.raises(BundleError, match="holds a bundle already"), BundleWriter(tmp_path / "b") as slow:
        write(tmp_path / "b", b"fast")
        slow.commit(make_manifest())
    assert os.listdir(tmp_path) == ["b"]
    assert read_bundle(tmp_path / "b").file("vision.onnx").read_bytes() == b"fast"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def export(wrap: bool) -> None:
        with BundleWriter(tmp_path / "new" / "b"):
            try:
                raise full
            except OSError as error:
                if wrap:
                    raise ExportError("torch.onnx failed") from error
                raise

    for wrap in (False, True):
        text = refusal(lambda wrap=wrap: export(wrap))
        assert "the disk is full" in text and str(tmp_path / "new" / "b") in text
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [1000, 2500])
def test_a_real_limit(tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE stands in for a full disk: met by the graph, then by the manifest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def export() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            (writer.path / "vision.onnx").write_bytes(bytes(2000))
            writer.commit(make_manifest(tools={f"tool {i}": "1.0" for i in range(100)}))

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        text = refusal(export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the disk is full (File too large)" in text
    assert not os.listdir(tmp_path)


# ---- updating


def test_an_engine_is_added_later(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    (tmp_path / "built.engine").write_bytes(b"plan")
    added = update_bundle(
        bundle, add={"vision.sm80.rtx.engine": tmp_path / "built.engine", "report.md": b"# report"},
        engines=[make_engine()], parity=[HOP],
    )
    assert read_bundle(tmp_path / "b") == added
    assert added.file("vision.sm80.rtx.engine").read_bytes() == b"plan"
    assert added.manifest.parity == (HOP,)
    again = update_bundle(
        bundle, add={"vision.sm80.rtx.engine": b"better plan"}, engines=[make_engine(version="1.8")]
    )  # `bundle` is stale by now: what counts is the disk
    assert read_bundle(tmp_path / "b") == again
    assert [e.version for e in again.manifest.engines] == ["1.8"]
    assert again.manifest.parity == added.manifest.parity
    assert not [name for name in os.listdir(tmp_path / "b") if name.endswith(".tmp")]


def test_updates_that_cannot_be(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    assert "graph" in refusal(lambda: update_bundle(bundle, add={"vision.onnx": b"other"}))
    assert "not its file" in refusal(lambda: update_bundle(bundle, engines=[make_engine()]))
    assert "cannot be a file" in refusal(lambda: update_bundle(bundle, add={"a/b": b""}))
    assert "could not be updated" in refusal(lambda: update_bundle(bundle, add={"x": tmp_path / "none"}))
    assert read_bundle(tmp_path / "b") == bundle
    assert sorted(os.listdir(tmp_path / "b")) == ["manifest.json", "vision.onnx", "vision.onnx.data"]


@pytest.mark.parametrize("fail_at", range(1, 4))
def test_an_update_that_is_interrupted_leaves_a_valid_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    """Three moves when an engine is replaced: a manifest without it, the engine, the manifest with it."""
    name = "vision.sm80.rtx.engine"
    bundle = update_bundle(write(tmp_path / "b"), add={name: b"old"}, engines=[make_engine()])
    calls = []
    move = os.replace

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_bundle(bundle, add={name: b"new!"}, engines=[make_engine(version="1.8")])
    monkeypatch.undo()
    left = read_bundle(tmp_path / "b")
    assert len(left.manifest.engines) == (1 if fail_at == 1 else 0)
    assert not [file for file in os.listdir(tmp_path / "b") if file.endswith(".tmp")]


def test_updates_at_once_lose_nothing(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    names = [f"vision.sm{n}.engine" for n in (75, 80, 86, 89)]
    threads = [
        threading.Thread(target=lambda n=n: update_bundle(bundle, add={n: n.encode()}, engines=[make_engine(n)]))
        for n in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.file for e in read_bundle(tmp_path / "b").manifest.engines) == names


def test_a_manifest_may_not_vouch_for_a_file_that_is_not_there() -> None:
    refusal(lambda: replace(make_manifest(), engines=(make_engine(),)).to_json())
