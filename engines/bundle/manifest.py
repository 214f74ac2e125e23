"""What a bundle says of itself: the manifest, strict JSON that ends in a digest of the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from earlytom.config import ATTENTION_FORMS, EarlyTomConfig
from earlytom.dtypes import check_dtype
from earlytom.errors import BundleError, ConfigError, InputError
from earlytom.parity.results import HopReport
from earlytom.shapes import StaticShapes, derive_shapes
from earlytom.vision.geometry import VisionGeometry

from ..products import COMPATIBILITY, PRODUCTS

MANIFEST = "manifest.json"
MODEL = "vision.onnx"
VERSION = 1  # of the manifest that this program writes, and the newest that it reads
DIGEST_KEY = "manifest_sha256"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at the border of an engine; dtype as NumPy and torch name it, "float16" or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TokenCounts:
    """B, n, B * n, the newlines at most, and the length of the token axis."""

    frames_left: int
    patches_kept: int
    visual_tokens: int
    newlines: int
    tokens: int

    @classmethod
    def of(cls, shapes: StaticShapes) -> TokenCounts:
        return cls(shapes.final_frames, shapes.keep, shapes.visual_tokens, shapes.newlines, shapes.tokens)


@dataclass(frozen=True)
class Inspection:
    """What was seen of an engine where it was built: an EngineSummary, with its `attention` and `fused` counted."""

    kernels: int
    attention: int
    fused: int
    unfused: tuple[str, ...]
    fused_kernels: tuple[str, ...]
    other_types: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class BuildSettings:
    """How an engine was built, as BuildOptions has it; inspected: None where nobody looked."""

    workspace: int
    optimization_level: int | None = None
    strip_weights: bool = False
    detailed: bool = True
    tf32: bool = False
    inspected: Inspection | None = dataclasses.field(default=None, metadata={"may_lack": True})  # as gpu_check's do


@dataclass(frozen=True)
class EngineRecord:
    """A TensorRT engine: what built it, for which cards ("sm80"), and on which (gpu and driver, None without one)."""

    file: str
    product: str
    version: str
    targets: tuple[str, ...]
    compatibility: str
    version_compatible: bool
    gpu: str | None
    driver: str | None
    cuda: str | None
    settings: BuildSettings

    def __post_init__(self) -> None:
        for name, allowed in (("product", PRODUCTS), ("compatibility", COMPATIBILITY)):
            if getattr(self, name) not in allowed:
                raise BundleError(
                    f"engine {self.file}: {name} is {getattr(self, name)!r}, it must be one of {', '.join(allowed)}"
                )
        if not self.targets or not all(t.startswith("sm") and t[2:].isdigit() for t in self.targets):
            raise BundleError(f"engine {self.file}: targets are {list(self.targets)}, not like sm80, sm89")


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a bundle; `Manifest.derive` fills what follows from the configuration.

    checkpoint: name, format, digest and whatever else identifies the weights; parity: one for each hop; traced: names
    of intermediate tensors in the graph; request_key: recognises a repeated run. Dictionaries must be plain JSON (null,
    not NaN). Raises BundleError when tensors or counts disagree with the configuration.
    """

    config: EarlyTomConfig
    geometry: VisionGeometry
    dtype: str
    batch: int
    opset: int
    attention: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    counts: TokenCounts
    checkpoint: dict[str, Any]
    tools: dict[str, str]
    traced: tuple[str, ...] = ()
    engines: tuple[EngineRecord, ...] = ()
    parity: tuple[HopReport, ...] = ()
    request_key: str = ""
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def derive(
        cls, config: EarlyTomConfig, geometry: VisionGeometry, *, dtype: str, batch: int = 1, **rest: Any
    ) -> Manifest:
        """A manifest whose inputs, outputs and counts are those of `config` on `geometry`; rest: the other fields."""
        inputs, outputs, counts = _derived(config, geometry, dtype, batch)
        return cls(config, geometry, dtype, batch, inputs=inputs, outputs=outputs, counts=counts, **rest)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", _plain(self.checkpoint, "the checkpoint's identity"))
        if self.version != VERSION:
            raise BundleError(f"manifest version {self.version!r} is not known: this program knows version {VERSION}")
        missing = [name for name in ("name", "format", "digest") if not isinstance(self.checkpoint.get(name), str)]
        if missing:
            raise BundleError(f"the checkpoint's identity lacks {', '.join(missing)}")
        if self.attention not in ATTENTION_FORMS:
            raise BundleError(f"attention is {self.attention!r}, it must be one of {', '.join(ATTENTION_FORMS)}")
        expected = _derived(self.config, self.geometry, self.dtype, self.batch)
        for name, derived in zip(("inputs", "outputs", "counts"), expected):
            if getattr(self, name) != derived:
                raise BundleError(
                    f"the manifest's {name} ({_show(getattr(self, name))}) disagree with its own configuration, which "
                    f"gives {_show(derived)}"
                )
        engines = [engine.file for engine in self.engines]
        if len(set(engines)) < len(engines):
            raise BundleError(f"two engines of the manifest share a file: {', '.join(engines)}")

    @property
    def shapes(self) -> StaticShapes:
        return derive_shapes(self.config, self.geometry, self.batch)

    def to_json(self) -> str:
        """Text of manifest.json: sorted keys, digest of itself, the same bytes for the same manifest."""
        check_files(self)
        body = dataclasses.asdict(self) | {"parity": [hop.to_dict() for hop in self.parity]}
        return json.dumps(body | {DIGEST_KEY: _body_digest(body)}, sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest that `to_json` wrote. Raises BundleError when it is garbage, newer, edited or incomplete."""
        try:
            body = json.loads(text, object_pairs_hook=_unique)
            version = body["version"] if isinstance(body, dict) and DIGEST_KEY in body else None
            if type(version) is not int:
                raise BundleError("it is not the manifest of a bundle")
            if version > VERSION:
                raise BundleError(
                    f"it has version {version} and this program reads version {VERSION}: upgrade earlytom-export"
                )
            if body.pop(DIGEST_KEY) != _body_digest(body):
                raise BundleError("it was edited after it was written: its digest no longer fits, so export again")
            manifest: Manifest = _decode(cls, body, "manifest")
        except (ValueError, KeyError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, NaN
            raise BundleError(f"it is damaged ({type(error).__name__}: {error})") from None
        check_files(manifest)
        return manifest


def _derived(
    config: EarlyTomConfig, geometry: VisionGeometry, dtype: str, batch: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], TokenCounts]:
    try:
        kind = check_dtype(dtype).torch
        shapes = derive_shapes(config, geometry, batch)
    except ConfigError as error:
        raise BundleError(f"the manifest's configuration cannot be: {error}") from None
    inputs, outputs = (
        tuple(TensorSpec(name, of, shape) for name, (of, shape) in tensors.items())
        for tensors in (shapes.inputs, shapes.outputs(kind))
    )
    return inputs, outputs, TokenCounts.of(shapes)


def _show(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_files(manifest: Manifest) -> None:
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST) or any(c in name for c in "/\\\0"):
            raise BundleError(f"the manifest lists {name!r}, which cannot be a file of a bundle")
    for engine in manifest.engines:
        if engine.file not in manifest.files:
            raise BundleError(f"the manifest lists the engine {engine.file}, but not its file")


def _body_digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any, what: str) -> Any:
    """`value` as a trip through JSON leaves it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what} cannot be written as JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice")
    return values


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed JSON, as an instance of the annotation `kind`. Raises BundleError naming what does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decode(args[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is HopReport:
        try:
            return HopReport.from_dict(value)
        except InputError as error:
            raise BundleError(f"{where}: {error}") from None
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        names = {field.name for field in fields(kind)}
        needed = {field.name for field in fields(kind) if "may_lack" not in field.metadata}
        odd = [f"unknown {n}" for n in sorted(value.keys() - names)]
        odd += [f"no {n}" for n in sorted(needed - value.keys())]
        if odd:
            raise BundleError(f"{where} has {', '.join(odd)}")
        hints = typing.get_type_hints(kind)
        parts = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        try:
            return kind(**parts)
        except ConfigError as error:
            raise BundleError(f"{where}: {error}") from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names_of = {tuple: "a list", dict: "an object"}
        expected = names_of.get(origin) or ("an object" if is_dataclass(kind) else kind.__name__)
        raise BundleError(f"{where} is {value!r:.60}, it must be {expected}")
    return value


def request_key(request: Mapping[str, Any]) -> str:
    """Digest of everything that decides what an export writes (plain JSON): the same key, the same bundle."""
    return _body_digest(_plain(dict(request), "the request"))
