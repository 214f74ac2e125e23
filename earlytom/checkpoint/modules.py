"""Modules without weights, and weights put into them: those of a checkpoint, or the tensors of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, InputError
from ..language.devices import has_hooks
from ..vision.siglip import Vision
from .dispatch import keep_output_with_input
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
    """Our modules over the tensors of a live model of either format (see `live_config`).

    Of one that accelerate has spread over several devices, or offloaded, Qwen2 holds the model's own decoder layers,
    whose hooks bring inputs and weights together. Raises InputError when the vision part is not on one device, or the
    rest on several without hooks; CheckpointError listing what is missing, unexpected or misshapen.
    """
    where = Path(f"<{type(model).__name__}>")
    state = model.state_dict()
    stored = {key: Stored("F32", tuple(tensor.shape)) for key, tensor in state.items()}
    attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
    modules, _, found = empty_modules(where, config, stored, PARTS, str(attention))
    tensors = {slot: state[key] for slot, key in found.items()}
    language, vision_device = modules["language"], _vision_device(where, tensors)
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) == 1:
        assign(modules, config, tensors)
        finish(language, vision_device, ())
    elif has_hooks(model):
        assign({"vision": modules["vision"]}, config, tensors)
        _share_layers(language.eval(), model, {locate(key, config.format): key for key in state})
    else:
        names = " and ".join(sorted(map(str, devices)))
        raise InputError(
            f"the weights of {where} are on {names}, without accelerate's hooks that go with that: load the model with "
            "device_map=, or move it to one device"
        )
    return SharedParts(modules["vision"], language, _probe(model))


def _vision_device(where: Path, tensors: Mapping[Slot, torch.Tensor]) -> torch.device:
    """The one device of the vision part. Raises InputError; offloaded weights are on the meta device."""
    devices = {tensor.device for (part, _), tensor in tensors.items() if part == "vision"}
    if len(devices) > 1 or torch.device("meta") in devices:
        names = " and ".join(sorted(map(str, devices)))
        raise InputError(
            f"the vision tower, projector and newline of {where} are on {names}, EarlyTom needs them on one device and "
            "not offloaded (meta): load the model with a device_map that puts them together; the language model may be "
            "spread and offloaded"
        )
    return devices.pop()


def _share_layers(language: Qwen2, model: torch.nn.Module, keys: Mapping[Slot | None, str]) -> None:
    """Make the language modules of a live model those of `language`, hooks and all. keys: slot -> name in the model."""
    embedding, head = (
        keys["language", name].removesuffix(".weight") for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    body: Any = model.get_submodule(embedding.rpartition(".")[0])
    lm_head: Any = model.get_submodule(head)
    for name, _ in list(language.model.named_children()):
        setattr(language.model, name, getattr(body, name))
    language.lm_head = lm_head
    language.config._attn_implementation = body.config._attn_implementation
    if hasattr(model, "hf_device_map"):
        language.hf_device_map = model.hf_device_map
    keep_output_with_input(language)


def _probe(model: torch.nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((weight.data_ptr(), weight.dtype) for weight in model.parameters())


def _language(
    directory: Path, config: CheckpointConfig, stored: Mapping[str, Stored], attn_implementation: str
) -> Qwen2:
    """Qwen2 without weights. Raises CheckpointError on a configuration, InputError on an attention, that it refuses."""
    from ..language.qwen2 import Qwen2
    from ..language.versions import qwen2_config

    text = dict(config.text)
    if "vocab_size" not in text:  # some LLaVA-NeXT files do not tell it: then it is the embedding's length
        for key, tensor in stored.items():
            if locate(key, config.format) == ("language", "model.embed_tokens.weight") and tensor.shape:
                text["vocab_size"] = tensor.shape[0]
    try:
        settings = qwen2_config(text)
    except Exception as error:  # transformers' strict configurations raise huggingface_hub's own types
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / 'config.json'} does not describe a Qwen2: {reason}") from None
    settings._attn_implementation = attn_implementation
    try:
        return Qwen2(settings)
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
