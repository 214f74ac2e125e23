"""Modules without weights, and weights put into them: those of a checkpoint, or the tensors of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, InputError
from ..vision.siglip import Vision
from .formats import CheckpointConfig
from .keys import PARTS, Slot, Stored, Unused, locate, match

if TYPE_CHECKING:
    from ..language.qwen2 import Qwen2


def empty_modules(
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


def assign(modules: Mapping[str, Any], config: CheckpointConfig, tensors: Mapping[Slot, torch.Tensor]) -> None:
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
    modules, _, found = empty_modules(where, config, stored, PARTS, str(attention))
    assign(modules, config, {slot: state[key] for slot, key in found.items()})
    finish(modules["language"], modules["vision"].device, ())
    return SharedParts(modules["vision"], modules["language"], _probe(model))


def _probe(model: torch.nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((weight.data_ptr(), weight.dtype) for weight in model.parameters())


def _language(
    directory: Path, config: CheckpointConfig, stored: Mapping[str, Stored], attn_implementation: str
) -> Qwen2:
    """Qwen2 without weights. Raises CheckpointError on a configuration, InputError on an attention, that it refuses."""
    from transformers import Qwen2Config

    from ..language.qwen2 import Qwen2

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
    except Exception as error:  # an activation nobody knows, sizes that leave no head: not all of it is validated above
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{directory / 'config.json'} does not describe a Qwen2: {reason}") from None


def finish(language: Qwen2, device: torch.device, eos: tuple[int, ...]) -> None:
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
