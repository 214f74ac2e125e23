"""Loading a checkpoint: LLaVA-NeXT's format, transformers' format, or the built-in demo, from safetensors, strictly."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import POOLING
from ..errors import CheckpointError, InputError, first_line
from ..vision.geometry import VisionGeometry
from ..vision.siglip import Vision
from .dispatch import Dispatcher, Spreading
from .files import INDEX, read_header, read_index, tensor_files
from .formats import read_config
from .identity import CheckpointIdentity, weights_digest
from .keys import PARTS, Stored, locate, wanted
from .modules import assign, empty_modules, finish
from .tensors import DTYPES, read_tensors

if TYPE_CHECKING:
    from ..language.qwen2 import Qwen2

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # a checkpoint without either has no tokenizer
HUB_PATTERNS = ("*.json", "merges.txt", "*.jinja")  # fetched first; then the weight files that the parts need


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
    check: Callable[[CheckpointIdentity], None] | None = None,
    device_map: str | Path | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
) -> Model:
    """Load a checkpoint's weights, those of `parts` only, cast to `dtype` on `device`; modules are in eval mode.

    checkpoint: "demo" (see demo.py), a directory, or a hub id, fetched through huggingface_hub, which honours
    HF_HUB_OFFLINE; only JSON, tokenizer and safetensors files are ever fetched. parts: of "vision" and "language"; a
    weight file that holds nothing of them is neither fetched nor opened. pooling: in place of the checkpoint's own
    (LLaVA-Video is evaluated with "average" whatever its file says). device: "meta" checks every name and shape and
    reads no weight. attn_implementation: the LLM's attention, as transformers names it; None takes flash
    attention where it is installed and fits device and dtype, else sdpa. check: is given the identity before a weight
    is read, and may raise. Tensors are read one at a time into modules that hold nothing before, so memory never holds
    more than the model and one tensor.

    device_map: spreads the language part over cards, memory and disk with accelerate, in place of `device`, which is
    that of the vision part then: "auto", a JSON file, or a map from its modules (model.embed_tokens, model.layers.0,
    model.norm, lm_head; "" or "model.layers" for all below) to the number of a card, "cpu" or "disk". offload_folder:
    holds what lies on disk, cast to `dtype`, as long as the model is there.

    Raises CheckpointError, one sentence, when there is no such checkpoint, when it is foreign, damaged or incomplete,
    and when tensors are missing, unexpected, misshapen or of an unreadable dtype, all listed; InputError on arguments,
    ConfigError on a device map that does not fit the model or the machine.
    """
    if isinstance(parts, str) or not parts or set(parts) - set(PARTS):
        raise InputError(f"parts is {parts!r}, it must be a tuple of one or both of {' and '.join(PARTS)}")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype}, it must be one of {', '.join(map(str, DTYPES))}")
    if pooling not in (None, *POOLING):
        raise InputError(f"pooling is {pooling!r}, it must be one of {', '.join(POOLING)}")
    parts = tuple(part for part in PARTS if part in parts)
    spreading = None if device_map is None else Spreading.of(device_map, offload_folder)
    if spreading is not None and ("language" not in parts or torch.device(device).type == "meta"):
        raise InputError("a device map spreads the language model's weights: load that part, and not on device meta")
    if spreading is None and offload_folder is not None:
        raise InputError("an offload folder goes with a device map, without which nothing is put on disk")
    where = torch.device(device) if spreading is None else spreading.main
    attn_implementation = attn_implementation or best_attention(where, dtype)
    asked = (dtype, torch.device(device), parts, attn_implementation, pooling, check, spreading)
    if str(checkpoint) == "demo":
        from .demo import write_demo

        try:
            temporary = tempfile.TemporaryDirectory(prefix="earlytom-demo-")
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"there is no temporary directory to write the demo to (TMPDIR): {reason}") from None
        with temporary as made:
            return _load(write_demo(made), "demo", "demo", *asked)
    return _load(checkpoint_directory(checkpoint, parts), str(checkpoint), None, *asked)


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
    try:
        path = Path(checkpoint).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a directory that is not ours to read; no such user's ~
        raise CheckpointError(f"{checkpoint} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if exists:
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
        reason = first_line(error).rstrip(".:")
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
    check: Callable[[CheckpointIdentity], None] | None,
    spreading: Spreading | None,
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

    modules, needed, found = empty_modules(directory, config, stored, parts, attn_implementation)
    identity = CheckpointIdentity(
        name=name,
        format=format or config.format,
        digest=weights_digest(directory, config, files),
        geometry=config.geometry,
        pooling=config.pooling,
        newline=config.newline,
        language_layers=config.text["num_hidden_layers"],
        language=config.language,
    )
    if check is not None:
        check(identity)
    language: Any = modules.get("language")
    tokenizer, eos = None, config.eos_token_ids
    if language is not None:
        tokenizer = _tokenizer(directory, language.config)
        if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
            eos = (tokenizer.eos_token_id,)
    if spreading is not None:
        placement = spreading.place(language, dtype)
        with Dispatcher(placement, spreading.folder, device) as dispatcher:
            dispatcher.check_room(needed, dtype)
            tensors = read_tensors(directory, homes, found, dtype, dispatcher.device, dispatcher.keep)
            assign(modules, config, tensors)
            finish(language, torch.device(placement.main), eos)
            dispatcher.dispatch(language)
    else:
        if device.type == "meta":
            tensors = {slot: torch.empty(shape, dtype=dtype, device=device) for slot, shape in needed.items()}
        else:
            tensors = read_tensors(directory, homes, found, dtype, lambda slot: device)
        assign(modules, config, tensors)
        if language is not None:
            finish(language, device, eos)
    return Model(modules.get("vision"), language, tokenizer, identity, eos)


def _tokenizer(directory: Path, config: Any) -> Any:
    """transformers' tokenizer, or None where there is none. Raises CheckpointError."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, config=config, local_files_only=True)
    except Exception as error:  # whatever tokenizers and transformers raise on a damaged file
        raise CheckpointError(f"the tokenizer of {directory} cannot be read: {' '.join(str(error).split())}") from None
