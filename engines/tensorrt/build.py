"""Build a TensorRT engine from a bundle's graph, with either product: options, file names, and the build itself.

The building happens in a process of its own, see worker.py. Polygraphy's loaders are not used: which product they
mean is settled once for the process, by an environment variable, and they drop the nodes of the parser's errors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from earlytom.dtypes import DTYPES
from earlytom.errors import ConfigError, EngineError

from ..bundle.manifest import BuildSettings, EngineRecord, Manifest
from ..cards import current_card, sort_targets
from ..products import COMPATIBILITY, check_target, import_product, product_of
from .worker import no_card

MIB = 1 << 20
_WORKER = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from engines.tensorrt.worker import main
sys.exit(main())"""


@dataclass(frozen=True)
class BuildOptions:
    """What to build and how; the defaults are those of `earlytom-export`.

    targets: compute capabilities ("sm80"), see parse_targets; empty: all that the product can, for TensorRT the card in
    the machine. workspace: bytes that one kernel may use besides its tensors (TensorRT's own default is all there is).
    optimization_level: 0..5, None for the product's; TensorRT for RTX ignores it. timing_cache: directory in which
    measured kernel times are kept across builds, one file for each version and model of card; only TensorRT has one.
    hardware_compatibility: "none", "ampere+" or "same-cc"; version_compatible; strip_weights: leave out the weights,
    which the graph beside the engine gives back at loading. detailed: keep what the inspector shows. tf32: let float32
    products, which compare frames, round to 10 bits of mantissa.

    Raises ConfigError for what cannot be, EngineError for what the product does not offer.
    """

    product: str = "tensorrt-rtx"
    targets: tuple[str, ...] = ()
    workspace: int = 4096 * MIB
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    detailed: bool = True
    tf32: bool = False

    def __post_init__(self) -> None:
        product = product_of(self.product)
        if isinstance(self.targets, str) or not all(t.startswith("sm") and t[2:].isdigit() for t in self.targets):
            raise ConfigError(f"targets are {self.targets!r}, they must be like ('sm80', 'sm89')")
        targets = sort_targets(self.targets) or product.targets
        object.__setattr__(self, "targets", targets)
        for target in targets:
            check_target(product, target)
        if not product.ahead_of_time and len(targets) > 1:
            raise ConfigError(f"{product.title} builds for one card, the one in the machine, not {', '.join(targets)}")
        if type(self.workspace) is not int or self.workspace < MIB:
            raise ConfigError(f"workspace is {self.workspace!r} bytes, it must be at least {MIB}, such as {4096 * MIB}")
        if self.optimization_level not in (None, 0, 1, 2, 3, 4, 5):
            raise ConfigError(f"optimization_level is {self.optimization_level!r}, it must lie in 0..5")
        if self.timing_cache is not None:
            object.__setattr__(self, "timing_cache", Path(self.timing_cache))
        if self.hardware_compatibility not in COMPATIBILITY:
            raise ConfigError(
                f"hardware_compatibility is {self.hardware_compatibility!r}, it must be one of "
                f"{', '.join(COMPATIBILITY)}"
            )
        asked = {
            "hardware_compatibility": self.hardware_compatibility != "none",
            "version_compatible": self.version_compatible,
            "strip_weights": self.strip_weights,
        }
        odd = [name for name, wanted in asked.items() if wanted and not getattr(product, name)]
        if odd:
            raise EngineError(
                f"{product.title} does not offer {', '.join(odd)}: leave it out, or use --engine tensorrt on the card"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = dataclasses.asdict(self)
        return values | {"targets": list(self.targets), "timing_cache": self.timing_cache and str(self.timing_cache)}

    def settings(self) -> BuildSettings:
        """What the manifest records of how an engine was built: nothing of the machine."""
        return BuildSettings(self.workspace, self.optimization_level, self.strip_weights, self.detailed, self.tf32)


def engine_file_name(options: BuildOptions, targets: tuple[str, ...] | None = None) -> str:
    """vision.sm80.rtx.engine, vision.sm80-sm86.rtx.engine, vision.sm90.trt.engine, vision.sm90.ampere-plus.trt.engine.

    targets: where the options leave them to the build; default: the card in the machine.
    """
    targets = targets or options.targets
    if not targets:
        card = current_card()
        targets = (card.target,) if card else ("card",)
    compatibility = {"ampere+": ["ampere-plus"], "same-cc": ["same-cc"]}.get(options.hardware_compatibility, [])
    kind = [name for name in ("version_compatible", "strip_weights") if getattr(options, name)]
    parts = ["vision", "-".join(targets), *compatibility, *(name.replace("_", "-") for name in kind)]
    return ".".join([*parts, product_of(options.product).suffix, "engine"])


def probe_build(product: str) -> str:
    """With what this machine can build, for people. Raises EngineError: what is missing, how to get it."""
    known, module = product_of(product), import_product(product)
    if known.ahead_of_time:
        return f"{known.title} {module.__version__}, for {', '.join(known.targets)} without a GPU"
    card = current_card()
    if card is None:
        raise no_card(known)
    return f"{known.title} {module.__version__} on {card.name} ({card.target})"


def build_engine(
    onnx_path: Path | str, manifest: Manifest, destination: Path | str, options: BuildOptions | None = None, *,
    progress: Callable[[str], None] | None = None,
) -> EngineRecord:
    """Write an engine for the graph at `onnx_path`, which `manifest` describes, into the directory `destination`.

    The file appears whole or not at all; with TensorRT for RTX it has the same bytes every time. progress: called with
    what is being done; an exception that it raises, Ctrl-C among them, ends the build at once and leaves nothing.

    Returns the record for the manifest. Raises EngineError when the product is missing, the graph is not the
    manifest's, the parser objects to it, it would compute in float32 unasked, or no engine could be built.
    """
    options = options or BuildOptions()
    folder = Path(destination)
    temporary = folder / f".{secrets.token_hex(4)}.tmp"
    request = {
        "product": options.product,
        "targets": options.targets,
        "options": options.to_dict(),
        "onnx": os.path.abspath(onnx_path),
        "destination": os.path.abspath(temporary),
        "dtype": DTYPES[manifest.dtype].torch,
        "attention": manifest.attention == "fused",
        "inputs": [dataclasses.astuple(spec) for spec in manifest.inputs],
        "outputs": [dataclasses.astuple(spec) for spec in manifest.outputs],
    }
    if not folder.is_dir():
        raise EngineError(f"the engine cannot be written: {folder} is not a directory")
    if not Path(onnx_path).is_file():
        raise EngineError(f"there is no graph {onnx_path} to build an engine from")
    try:
        done = _run_worker(request, progress or (lambda step: None))
        name = engine_file_name(options, tuple(done["targets"]))
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return EngineRecord(
        file=name,
        product=options.product,
        version=done["version"],
        targets=tuple(done["targets"]),
        compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        gpu=done["gpu"],
        driver=done["driver"],
        cuda=done["cuda"],
        settings=options.settings(),
    )


def _run_worker(request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """The worker's answer. It does not outlive this call."""
    paths = json.dumps([path or os.getcwd() for path in sys.path])
    title = product_of(request["product"]).title
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            [sys.executable, "-c", _WORKER, paths],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us, and we end it
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        try:
            assert worker.stdin is not None and worker.stdout is not None
            try:
                json.dump(request, worker.stdin)
                worker.stdin.close()
            except BrokenPipeError:  # it ended already: its last words tell why
                pass
            for line in worker.stdout:
                message = json.loads(line)
                if "step" in message:
                    progress(message["step"])
                elif "error" in message:
                    raise EngineError(message["error"])
                else:
                    done: dict[str, Any] = message["done"]
                    return done
            code = worker.wait()
            raise EngineError(f"the process that builds with {title} {_ended(code)}: {_last_words(errors)}")
        finally:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass


def _ended(code: int) -> str:
    if code == -9:
        return "was killed, probably for want of memory"
    return f"was ended by signal {-code}" if code < 0 else f"failed with status {code}"


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
