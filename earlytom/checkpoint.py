"""Loading a checkpoint: LLaVA-NeXT's format, transformers' format, or the built-in demo, from safetensors, strictly."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint_config import CheckpointConfig, read_config
from .config import POOLING
from .errors import CheckpointError, InputError
from .keys import PARTS, Slot, Stored, Unused, locate, match
from .vision.geometry import VisionGeometry
from .vision.siglip import Vision
from .weights import INDEX, read_header, read_index, read_tensors, tensor_files, wanted, weights_digest

if TYPE_CHECKING:
    from .language.qwen2 import Qwen2

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # a checkpoint without either has no tokenizer
HUB_PATTERNS = ("*.json", "merges.txt", "*.jinja")  # fetched first; then the weight files that the parts need


@dataclass(frozen=True)
class CheckpointIdentity:
    """Which checkpoint this is.

    name: as given to `load`; format: "llava-next", "transformers" or "demo"; digest: see `weights_digest`; geometry,
    pooling, newline: of the vision side, the last two as in Vision; language_layers: decoder layers of the LLM. The
    same whichever parts were loaded.
    """

    name: str
    format: str
    digest: str
    geometry: VisionGeometry
    pooling: str
    newline: str
    language_layers: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Model:
    """What `load` read.

    vision, language: None when that part was not asked for; tokenizer: transformers' tokenizer, None when the language
    part was not asked for or the checkpoint has none; eos_token_ids: ids that end an answer, () when not known.
    """

    vision: Vision | None
    language: Qwen2 | None
    tokenizer: Any
    identity: CheckpointIdentity
    eos_token_ids: tuple[int, ...]

    @property
    def geometry(self) -> VisionGeometry:
        return self.identity.geometry


def load(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parts: Sequence[str] = PARTS,
    attn_implementation: str | None = None,
    pooling: str | None = None,
) -> Model:
    """Load a checkpoint's weights, those of `parts` only, cast to `dtype` on `device`; modules are in eval mode.

    checkpoint: "demo" (see earlytom.demo), a directory, or a hub id, fetched through huggingface_hub, which honours
    HF_HUB_OFFLINE; only JSON, tokenizer and safetensors files are ever fetched. parts: of "vision" and "language"; a
    weight file that holds nothing of them is neither fetched nor opened. pooling: in place of the checkpoint's own
    (LLaVA-Video is evaluated with "average" whatever its file says). device: "meta" checks every name and shape and
    reads no weight. attn_implementation: the LLM's attention, as transformers names it; None takes flash
    attention where it is installed and fits device and dtype, else sdpa. Tensors are read one at a time
    into modules that hold nothing before, so memory never holds more than the model and one tensor.

    Raises CheckpointError, one sentence, when there is no such checkpoint, when it is foreign, damaged or incomplete,
    and when tensors are missing, unexpected, misshapen or of an unreadable dtype, all listed; InputError on arguments.
    """
    if isinstance(parts, str) or not parts or set(parts) - set(PARTS):
        raise InputError(f"parts is {parts!r}, it must be a tuple of one or both of {' and '.join(PARTS)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype}, it must be a floating-point dtype such as torch.float16")
    if pooling not in (None, *POOLING):
        raise InputError(f"pooling is {pooling!r}, it must be one of {', '.join(POOLING)}")
    parts = tuple(part for part in PARTS if part in parts)
    attn_implementation = attn_implementation or best_attention(torch.device(device), dtype)
    if str(checkpoint) == "demo":
        from .demo import write_demo

        with tempfile.TemporaryDirectory(prefix="earlytom-demo-") as made:
            directory = write_demo(made)
            return _load(directory, "demo", "demo", dtype, torch.device(device), parts, attn_implementation, pooling)
    directory = checkpoint_directory(checkpoint, parts)
    return _load(directory, str(checkpoint), None, dtype, torch.device(device), parts, attn_implementation, pooling)


def best_attention(device: torch.device, dtype: torch.dtype) -> str:
    """"flash_attention_2" where flash-attn is installed and can run on this device in this dtype, else "sdpa"."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa"


def checkpoint_directory(checkpoint: str | Path, parts: Sequence[str] = PARTS) -> Path:
    """The local directory of a checkpoint given as a directory or a hub id, fetched if need be.

    Raises CheckpointError.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds a checkpoint's config.json and weights")
    hub_id = str(checkpoint)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub_id):
        raise CheckpointError(
            f"there is no checkpoint at {path}: give a directory, a hub id such as "
            "lmms-lab/llava-onevision-qwen2-7b-ov, or demo"
        )
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
        weights = ["*.safetensors"]
        if (directory / INDEX).is_file():
            format, files = read_config(directory).format, read_index(directory)
            weights = sorted({file for key, file in files.items() if wanted(key, format, parts)})
        return Path(snapshot_download(hub_id, allow_patterns=[*HUB_PATTERNS, *weights]))
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors have no common base: HTTP, offline, cache, validation, disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise CheckpointError(f"{hub_id} is no directory here, and fetching it from the hub failed: {reason}") from None


def _load(
    directory: Path,
    name: str,
    format: str | None,
    dtype: torch.dtype,
    device: torch.device,
    parts: tuple[str, ...],
    attn_implementation: str,
    pooling: str | None,
) -> Model:
    config = read_config(directory)
    if pooling is not None:
        config = replace(config, pooling=pooling)
    files = tensor_files(directory)
    needed_files = {file for key, file in files.items() if wanted(key, config.format, parts)}
    absent = sorted(file for file in needed_files if not (directory / file).is_file())
    if absent:
        raise CheckpointError(f"{directory / INDEX} names weight files that are not there: {', '.join(absent)}")
    stored: dict[str, Stored] = {key: Stored("F32", ()) for key in files if locate(key, config.format) is None}
    homes = {}
    for file in sorted(needed_files):
        for key, tensor in read_header(directory / file).items():
            if wanted(key, config.format, parts, unknown=True):
                stored[key], homes[key] = tensor, file

    modules, needed, found = _modules(directory, config, stored, parts, attn_implementation)
    if device.type == "meta":
        tensors = {slot: torch.empty(shape, dtype=dtype, device=device) for slot, shape in needed.items()}
    else:
        tensors = read_tensors(directory, homes, found, dtype, device)
    _assign(modules, config, tensors)

    language, tokenizer, eos = modules.get("language"), None, config.eos_token_ids
    if language is not None:
        tokenizer = _tokenizer(directory, language.config)
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
        _finish(language, device, eos)
    identity = CheckpointIdentity(
        name=name,
        format=format or config.format,
        digest=weights_digest(directory, config, files),
        geometry=config.geometry,
        pooling=config.pooling,
        newline=config.newline,
        language_layers=config.text["num_hidden_layers"],
    )
    return Model(modules.get("vision"), language, tokenizer, identity, eos)


def _modules(
    where: Path, config: CheckpointConfig, stored: Mapping[str, Stored], parts: Sequence[str], attn_implementation: str
) -> tuple[dict[str, Any], dict[Slot, tuple[int, ...]], dict[Slot, str]]:
    """Modules without weights, the shape of every slot they need, and under which name each is stored."""
    modules: dict[str, Any] = {}
    with torch.device("meta"):
        if "vision" in parts:
            modules["vision"] = Vision(config.geometry, config.pooling, config.newline)
        if "language" in parts:
            modules["language"] = _language(where, config, stored, attn_implementation)
    needed = {
        (part, key): tuple(tensor.shape)
        for part, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    if config.tied:
        needed.pop(("language", "lm_head.weight"), None)
    found = match(
        str(where),
        stored,
        needed,
        format=config.format,
        unused=Unused(config.geometry.layers, config.stored_layers, config.tied),
        optional=() if config.has_newline else (("vision", "image_newline"),),
    )
    return modules, needed, found


def _assign(modules: Mapping[str, Any], config: CheckpointConfig, tensors: Mapping[Slot, torch.Tensor]) -> None:
    """Make `tensors` the parameters of the modules, without a copy."""
    for part, module in modules.items():
        state = {key: tensor for (of, key), tensor in tensors.items() if of == part}
        if part == "language" and config.tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        if part == "vision" and "image_newline" not in state:
            state["image_newline"] = state["linear_2.bias"].new_zeros(config.geometry.projector_size)
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False).eval()


@dataclass(frozen=True)
class SharedParts:
    """Vision and Qwen2 over the tensors of a live model; `probe` tells whether any of it was moved or cast since."""

    vision: Vision
    language: Qwen2
    probe: tuple[tuple[int, torch.dtype], ...]

    def same_weights(self, model: torch.nn.Module) -> bool:
        return _probe(model) == self.probe


def share_weights(model: torch.nn.Module, config: CheckpointConfig) -> SharedParts:
    """Our modules over the tensors of a live model of either format (see `live_config`), on its one device.

    Raises InputError when its weights are on several devices, or offloaded by accelerate, which leaves them on the
    meta device but while their modules run; CheckpointError listing what is missing, unexpected or misshapen.
    """
    where = Path(f"<{type(model).__name__}>")
    state = model.state_dict()
    devices = sorted({str(tensor.device) for tensor in state.values()})
    if len(devices) != 1 or devices == ["meta"]:
        raise InputError(
            f"the weights of {where} are on {' and '.join(devices)}, EarlyTom needs all of them on one device and none "
            "offloaded: load the model without offloading, with device_map=None or a single device"
        )
    stored = {key: Stored("F32", tuple(tensor.shape)) for key, tensor in state.items()}
    attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
    modules, _, found = _modules(where, config, stored, PARTS, str(attention))
    _assign(modules, config, {slot: state[key] for slot, key in found.items()})
    _finish(modules["language"], modules["vision"].device, ())
    return SharedParts(modules["vision"], modules["language"], _probe(model))


def _probe(model: torch.nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((weight.data_ptr(), weight.dtype) for weight in model.parameters())


def _language(
    directory: Path, config: CheckpointConfig, stored: Mapping[str, Stored], attn_implementation: str
) -> Qwen2:
    """Qwen2 without weights. Raises CheckpointError on a configuration, InputError on an attention, that it refuses."""
    from transformers import Qwen2Config

    from .language.qwen2 import Qwen2

    text = dict(config.text)
    if "vocab_size" not in text:  # some LLaVA-NeXT files do not tell it: then it is the embedding's length
        for key, tensor in stored.items():
            if locate(key, config.format) == ("language", "model.embed_tokens.weight") and tensor.shape:
                text["vocab_size"] = tensor.shape[0]
    try:
        qwen2_config = Qwen2Config(**text)
    except Exception as error:  # transformers' strict configurations raise huggingface_hub's own types
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / 'config.json'} does not describe a Qwen2: {reason}") from None
    qwen2_config._attn_implementation = attn_implementation
    try:
        return Qwen2(qwen2_config)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"attn_implementation {attn_implementation!r} cannot be used: {reason}") from None


def _finish(language: Qwen2, device: torch.device, eos: tuple[int, ...]) -> None:
    """What no checkpoint holds: ties, the rotary table that the meta device left empty, and when generation ends."""
    language.tie_weights()
    if device.type != "meta":
        rotary = language.model.rotary_emb
        with torch.device("cpu"):
            language.model.rotary_emb = type(rotary)(language.config).to(device)
    if eos:
        language.generation_config.eos_token_id = list(eos)
        if language.generation_config.pad_token_id is None:
            language.generation_config.pad_token_id = eos[-1]


def _tokenizer(directory: Path, config: Any) -> Any:
    """transformers' tokenizer, or None where there is none. Raises CheckpointError."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, config=config, local_files_only=True)
    except Exception as error:  # whatever tokenizers and transformers raise on a damaged file
        raise CheckpointError(f"the tokenizer of {directory} cannot be read: {' '.join(str(error).split())}") from None
