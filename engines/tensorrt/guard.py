"""Whether a bundle's TensorRT engine may be loaded on this machine, and the command that builds one that may.

Every check here comes before a byte of the engine is deserialised: an engine is code. Product and version, compute
capability and compatibility level are compared with what the manifest says of the engine; what only the library can
tell (an old driver) is asked of its own header check where it has one. Sources: "Engine Compatibility" in the
documentation of TensorRT 11.4 and TensorRT-RTX 1.7.
"""

from __future__ import annotations

import re
from typing import Any

from earlytom.errors import EngineError

from ..bundle.manifest import EngineRecord
from ..bundle.reader import Bundle
from ..cards import Card, show_targets, sort_targets
from ..products import build_command, product_of

# Majors across which an engine built as version-compatible still runs: an older engine on a newer library.
ACROSS_MAJORS = {(10, 11)}
# Flags of get_engine_validity -> what they mean.
OBJECTIONS = {
    "VERSION_MISMATCH": "it is of another version",
    "UNSUPPORTED_CC": "it does not hold code for this card",
    "OLD_CUDA_DRIVER": "the driver is too old for it, so update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the card has too little memory for it",
    "MALFORMED_ENGINE": "it is not an engine",
    "CUDA_ERROR": "CUDA does not work here",
}


def choose_record(bundle: Bundle, name: str, card: Card | None, version: str | None) -> EngineRecord:
    """The engine of product `name` in the bundle that fits `card` and the library's `version` best.

    Raises EngineError with one sentence: no card, or for each engine why it does not fit and what builds one that does.
    """
    records = [record for record in bundle.manifest.engines if record.product == name]
    title = product_of(name).title
    if not records:
        command = build_command(bundle.path, name)
        raise EngineError(f"the bundle {bundle.path} holds no {name} engine; {command} adds one")
    if card is None or version is None:
        targets = sort_targets(target for record in records for target in record.targets)
        engines = "engine is" if len(records) == 1 else "engines are"
        raise EngineError(
            f"this machine has no CUDA device; the bundle's {title} {engines} for {show_targets(targets)}: run the "
            f"bundle {bundle.path} on a machine with such a card, or here with --engine onnxruntime"
        )
    reasons = {record.file: refusal(record, card, version) for record in records}
    fitting = [record for record in records if reasons[record.file] is None]
    if fitting:
        return min(fitting, key=lambda record: _preference(record, card))
    listed = "; ".join(f"{file} {reason}" for file, reason in reasons.items())
    raise EngineError(
        f"{title} {version} on {card.name} ({card.target}) cannot run what the bundle {bundle.path} holds: {listed}; "
        f"this builds one that fits: {rebuild_command(bundle, name, card.target)}"
    )


def refusal(record: EngineRecord, card: Card, version: str) -> str | None:
    """Why the engine does not fit ("is for sm80 (A100)"), or None when it does."""
    title = product_of(record.product).title
    if not version_fits(record, version):
        rule = (
            "version-compatible engines run on the same and later versions of their major"
            if record.version_compatible
            else "an engine runs on exactly the version that built it"
        )
        return f"was built with {title} {record.version} and this machine has {version} ({rule})"
    if not card_fits(record, card.target):
        level = "" if record.compatibility == "none" else f" with hardware compatibility {record.compatibility}"
        return f"is for {show_targets(record.targets)}{level}"
    return None


def version_fits(record: EngineRecord, version: str) -> bool:
    """Whether a library of this version takes the engine; TensorRT for RTX promises nothing across its releases."""
    if record.version == version:
        return True
    built, have = _numbers(record.version), _numbers(version)
    if not record.version_compatible or not built or not have:
        return False
    return have >= built and (have[0] == built[0] or (built[0], have[0]) in ACROSS_MAJORS)


def card_fits(record: EngineRecord, target: str) -> bool:
    """Whether a card of compute capability `target` ("sm80") runs the engine."""
    return target in record.targets or (record.compatibility == "ampere+" and int(target.removeprefix("sm")) >= 80)


def library_objection(trt: Any, runtime: Any, data: bytes) -> str | None:
    """What the library says against the header of an engine, or None. Only TensorRT for RTX can be asked."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, flags = runtime.get_engine_validity(data)
    if validity != trt.EngineValidity.INVALID:
        return None
    kinds = trt.EngineInvalidityDiagnostics
    said = [text for name, text in OBJECTIONS.items() if int(flags) & int(getattr(kinds, name, 0))]
    return " and ".join(said) or "it cannot say why"


def rebuild_command(bundle: Bundle, name: str, target: str) -> str:
    """The `earlytom-build` that adds an engine for `target` to the bundle, built as its engines of this product are.

    One for this card that another version built is replaced, whatever other cards it is for. A product that does not
    build for the card gives way to the other one, which builds on it.
    """
    product = product_of(name)
    records = [record for record in bundle.manifest.engines if record.product == name]
    if product.ahead_of_time and target not in product.targets:
        product, records = product_of("tensorrt"), []
    targets = {target}
    words: list[str] = []
    for record in sorted(records, key=lambda record: target not in record.targets)[:1]:
        if product.ahead_of_time and target in record.targets:
            targets |= {t for t in record.targets if t in product.targets}
        if record.compatibility != "none":
            words += ["--hardware-compatibility", record.compatibility]
        words += ["--version-compatible"] * record.version_compatible
        words += ["--strip-weights"] * record.settings.strip_weights
        if record.settings.optimization_level is not None:
            words += ["--optimization-level", str(record.settings.optimization_level)]
    return build_command(bundle.path, product.name, "--for", ",".join(sort_targets(targets)), *words)


def _preference(record: EngineRecord, card: Card) -> tuple[Any, ...]:
    """Smaller is better: tuned on this very card, least general, whole."""
    general = ("none", "same-cc", "ampere+").index(record.compatibility)
    return (
        record.gpu not in (None, card.name), general, record.version_compatible,
        record.settings.strip_weights, len(record.targets), record.file,
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
