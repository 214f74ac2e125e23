"""The contract between exporting and running: a directory with a graph, engines, and a manifest that vouches for them.

A bundle is flat: `vision.onnx`, `vision.onnx.data`, engines such as `vision.sm80.rtx.engine`, `report.md` and
`manifest.json`, which lists every other file with size and SHA-256 and ends in a digest of itself. A file that it does
not list is never used. The digests find damage, mixed-up copies and edits by hand; they are no signature: who wants to
deceive can compute them anew.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .config import EarlyTomConfig
from .errors import BundleError, ConfigError, EarlyTomError
from .shapes import StaticShapes, VisionGeometry, derive_shapes

MANIFEST = "manifest.json"
MODEL = "vision.onnx"
VERSION = 1  # of the manifest that this program writes, and the newest that it reads
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PRODUCTS = ("tensorrt-rtx", "tensorrt")
COMPATIBILITY = ("none", "ampere+", "same-cc")
_DIGEST = "manifest_sha256"
_CHUNK = 4 << 20


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
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _plain(self.settings, f"the settings of {self.file}"))
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

    checkpoint: name, format, digest and whatever else identifies the weights; parity: one plain JSON object for each
    hop; traced: names of intermediate tensors in the graph; request_key: recognises a repeated run. Dictionaries must
    be plain JSON (null, not NaN). Raises BundleError when tensors or counts disagree with the configuration.
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
    parity: tuple[dict[str, Any], ...] = ()
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
        object.__setattr__(self, "parity", tuple(_plain(list(self.parity), "the parity results")))
        object.__setattr__(self, "checkpoint", _plain(self.checkpoint, "the checkpoint's identity"))
        if self.version != VERSION:
            raise BundleError(f"manifest version {self.version!r} is not known: this program knows version {VERSION}")
        missing = [name for name in ("name", "format", "digest") if not isinstance(self.checkpoint.get(name), str)]
        if missing:
            raise BundleError(f"the checkpoint's identity lacks {', '.join(missing)}")
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
        _check_files(self)
        body = dataclasses.asdict(self)
        return json.dumps(body | {_DIGEST: _body_digest(body)}, sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest that `to_json` wrote. Raises BundleError when it is garbage, newer, edited or incomplete."""
        try:
            body = json.loads(text, object_pairs_hook=_unique)
            version = body["version"] if isinstance(body, dict) and _DIGEST in body else None
            if type(version) is not int:
                raise BundleError("it is not the manifest of a bundle")
            if version > VERSION:
                raise BundleError(
                    f"it has version {version} and this program reads version {VERSION}: upgrade earlytom-export"
                )
            if body.pop(_DIGEST) != _body_digest(body):
                raise BundleError("it was edited after it was written: its digest no longer fits, so export again")
            manifest: Manifest = _decode(cls, body, "manifest")
        except (ValueError, KeyError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, NaN
            raise BundleError(f"it is damaged ({type(error).__name__}: {error})") from None
        _check_files(manifest)
        return manifest


def _derived(
    config: EarlyTomConfig, geometry: VisionGeometry, dtype: str, batch: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], TokenCounts]:
    if dtype not in DTYPES:
        raise BundleError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    try:
        shapes = derive_shapes(config, geometry, batch)
    except ConfigError as error:
        raise BundleError(f"the manifest's configuration cannot be: {error}") from None
    inputs, outputs = (
        tuple(TensorSpec(name, kind, shape) for name, (kind, shape) in tensors.items())
        for tensors in (shapes.inputs, shapes.outputs(DTYPES[dtype]))
    )
    return inputs, outputs, TokenCounts.of(shapes)


def _show(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_files(manifest: Manifest) -> None:
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
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        names = {field.name for field in fields(kind)}
        odd = [f"unknown {n}" for n in sorted(value.keys() - names)] + [f"no {n}" for n in sorted(names - value.keys())]
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


# From here on: the directory.


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `read_bundle` makes it."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where the file `name` lies. Raises BundleError when the manifest does not vouch for it."""
        if name not in self.manifest.files:
            raise BundleError(f"the bundle {self.path} has no {name} in its manifest, so it is not used")
        return self.path / name

    def verify(self, *names: str, content: bool = True) -> None:
        """Raise BundleError unless the files (default: all) have the size and SHA-256 that the manifest says.

        All sizes are looked at before anything is hashed; content: False stops there.
        """
        wrong = []
        paths = [(self.file(name), self.manifest.files[name]) for name in names or sorted(self.manifest.files)]
        try:
            for path, record in paths:
                if not path.is_file():
                    wrong.append(f"{path.name} is missing")
                elif (size := path.stat().st_size) != record.bytes:
                    wrong.append(f"{path.name} has {size} bytes where the manifest says {record.bytes}")
            if content and not wrong:
                wrong = [f"{path.name} was changed (SHA-256)" for path, record in paths if _digest_file(path) != record]
        except OSError as error:
            wrong.append(f"{error.filename} cannot be read ({error.strerror})")
        if wrong:
            raise BundleError(f"the bundle {self.path} is damaged: {'; '.join(wrong)}; copy or export it again")


def read_bundle(path: Path | str, *, check: bool = True) -> Bundle:
    """The bundle at `path`, refused with a BundleError when it is not whole.

    check: hash every file (about 1 s for 1 GB); without it existence and size are still checked, and `Bundle.verify`
    can hash what is used.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise BundleError(f"{path} {'is a file, a bundle is a directory' if path.exists() else 'does not exist'}")
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}") from None
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error.strerror})") from None
    try:
        bundle = Bundle(path, Manifest.from_json(text))
    except EarlyTomError as error:
        raise BundleError(f"{path / MANIFEST} is refused: {error}") from None
    bundle.verify(content=check)
    return bundle


def request_key(request: Mapping[str, Any]) -> str:
    """Digest of everything that decides what an export writes (plain JSON): the same key, the same bundle."""
    return _body_digest(_plain(dict(request), "the request"))


def find_same(path: Path | str, key: str) -> Bundle | None:
    """The intact bundle at `path` that a run with the same request wrote, or None."""
    try:
        bundle = read_bundle(path)
    except BundleError:
        return None
    return bundle if key and bundle.manifest.request_key == key else None


class BundleWriter:
    """Writes a bundle beside its final place and renames it there: `output` is the old thing or the new, never half.

        with BundleWriter(output) as writer:
            ...                                # make files in writer.path
            bundle = writer.commit(manifest)   # hashes them, writes the manifest, renames

    An existing directory is refused unless it is empty, or force is set and it is an earlier bundle with nothing of
    somebody else in it. Leaving without `commit`, by an exception or by Ctrl-C removes everything, parent directories
    made on the way included. SIGTERM and SIGHUP end a process without unwinding it; a program that wants the same for
    them raises from a handler: `signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))`. What a killed process leaves
    is named `.<output>.<random>.partial`, and never taken for a bundle. Raises BundleError.
    """

    def __init__(self, output: Path | str, *, force: bool = False) -> None:
        self.output = Path(os.path.realpath(output))
        self.force = force
        token = secrets.token_hex(4)
        self.path = self.output.with_name(f".{self.output.name}.{token}.partial")
        self._displaced = self.output.with_name(f".{self.output.name}.{token}.old")
        self._created: list[Path] = []

    def __enter__(self) -> BundleWriter:
        _check_replaceable(self.output, self.force)
        parent = self.output.parent
        try:
            for missing in reversed([p for p in (parent, *parent.parents) if not p.exists()]):
                self._created.append(missing)
                missing.mkdir(exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            self._clean()
            raise BundleError(f"{self.output} cannot be made: {parent} is not writable ({error.strerror})") from None
        except BaseException:
            self._clean()
            raise
        return self

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash what lies in `path`, add it to `manifest`, write that, and move the directory to its place."""
        files = {}
        for entry in sorted(self.path.iterdir()):
            if entry.is_symlink() or not entry.is_file():
                raise BundleError(f"{entry} is not a plain file: a bundle holds nothing else")
            files[entry.name] = _digest_file(entry)
            _sync(entry)
        manifest = replace(manifest, files=files)
        _write_manifest(self.path, manifest)
        _sync(self.path)
        _check_replaceable(self.output, self.force)  # again: an export takes minutes
        if self.output.exists():
            os.rename(self.output, self._displaced)
        os.rename(self.path, self.output)  # when this fails, _clean puts the old one back
        _sync(self.output.parent)
        return Bundle(self.output, manifest)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._clean()
        cause: BaseException | None = error
        while cause is not None and isinstance(error, Exception) and not isinstance(error, BundleError):
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise BundleError(
                    f"the bundle {self.output} could not be written: the disk is full ({cause.strerror}); free some "
                    "space or choose another output directory"
                ) from error
            ours = (str(self.path), str(self.output))
            if cause is error and isinstance(cause, OSError) and str(cause.filename or "").startswith(ours):
                raise BundleError(f"the bundle {self.output} could not be written: {cause.strerror}") from error
            cause = cause.__cause__ or cause.__context__

    def _clean(self) -> None:
        if self._displaced.exists():
            if self.output.exists():
                shutil.rmtree(self._displaced, ignore_errors=True)
            else:
                os.rename(self._displaced, self.output)
        shutil.rmtree(self.path, ignore_errors=True)
        for directory in reversed(self._created):
            try:
                directory.rmdir()
            except OSError:  # holds the bundle, or something of somebody else
                pass


def update_bundle(
    bundle: Bundle, *, add: Mapping[str, Path | bytes] | None = None, engines: Sequence[EngineRecord] = (),
    parity: Sequence[dict[str, Any]] | None = None,
) -> Bundle:
    """Add files and engines to a bundle, or give it new parity results; the bundle as it then is.

    add: name -> file to copy, or content; engines: records, each in place of one with the same file; parity: takes the
    place of all earlier results. At every moment the directory is a valid bundle: files are put in place before the
    manifest that lists them, and one that is replaced is first taken out of the manifest. Two updates at once wait for
    each other (where flock works). The graph itself cannot be replaced. Raises BundleError.
    """
    path, add = bundle.path, dict(add or {})
    if {MODEL, f"{MODEL}.data"} & add.keys():
        raise BundleError(f"the graph of the bundle {path} cannot be replaced, its engines come from it: export again")
    temporary = {name: path / f".{secrets.token_hex(4)}.tmp" for name in add}
    with _locked(path):
        manifest = read_bundle(path, check=False).manifest
        try:
            records = {}
            for name, source in add.items():
                if isinstance(source, bytes):
                    temporary[name].write_bytes(source)
                else:
                    shutil.copyfile(source, temporary[name])
                _sync(temporary[name])
                records[name] = _digest_file(temporary[name])
            final = replace(
                manifest,
                files=manifest.files | records,
                engines=_without(manifest, {e.file for e in engines}).engines + tuple(engines),
                parity=manifest.parity if parity is None else tuple(parity),
            )
            _check_files(final)
            if add.keys() & manifest.files.keys():
                _write_manifest(path, _without(manifest, set(add)))
            for name, file in temporary.items():
                os.replace(file, path / name)
            _write_manifest(path, final)
        except OSError as error:
            raise BundleError(f"the bundle {path} could not be updated: {error.filename}: {error.strerror}") from error
        finally:
            for file in temporary.values():
                file.unlink(missing_ok=True)
    return Bundle(path, final)


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    files = {name: record for name, record in manifest.files.items() if name not in names}
    return replace(manifest, files=files, engines=tuple(e for e in manifest.engines if e.file not in names))


def _check_replaceable(output: Path, force: bool) -> None:
    """Raise BundleError unless a bundle may be put at `output` without harm to anybody's files."""
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise BundleError(f"the output {output} is a file: give a directory that does not exist yet")
    if os.path.ismount(output):
        raise BundleError(f"the output {output} is a mount point, which cannot be renamed: use {output / 'bundle'}")
    try:
        present = set(os.listdir(output))
    except OSError as error:
        raise BundleError(f"the output {output} cannot be read ({error.strerror})") from None
    if not present:
        return
    try:  # lenient: a damaged or newer bundle can be replaced as well
        known = json.loads((output / MANIFEST).read_bytes())
        listed = set(known["files"]) if _DIGEST in known else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        listed = None
    if listed is None:
        raise BundleError(
            f"the output {output} is not empty and not an earlier bundle, so it is left alone: choose another directory"
        )
    if not force:
        raise BundleError(f"the output {output} holds a bundle already: --force replaces it")
    foreign = sorted(n for n in present - listed - {MANIFEST} if not n.endswith((".engine", ".cache", ".tmp")))
    if foreign:
        raise BundleError(
            f"the output {output} holds files of somebody else ({', '.join(foreign[:3])}): move them away first"
        )


def _digest_file(path: Path) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(digest.hexdigest(), size)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    temporary = directory / f".{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_text(manifest.to_json(), encoding="ascii", newline="\n")
        _sync(temporary)
        os.replace(temporary, directory / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(directory)


def _sync(path: Path) -> None:
    """Have the disk hold `path` before anything that refers to it; directories only where the system allows."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # where late writing reports a full disk
            raise
    finally:
        os.close(handle)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        import fcntl  # not on Windows
        handle = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            pass
        yield
    finally:
        os.close(handle)
