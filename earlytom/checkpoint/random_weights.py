"""Random weights that depend on a seed and a name, scaled so that a deep model of any width stays lively."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from ..vision.geometry import VisionGeometry
from ..vision.siglip import Vision
from . import demo_tokenizer
from .keys import Slot

# Ends of names -> standard deviation of a weight, in units of fan-in ** -0.5 (elsewhere 1): attention that is far from
# uniform, residual branches that neither drown the stream nor vanish in it.
GAINS = {
    "q_proj.weight": 1.5, "k_proj.weight": 1.5, "out_proj.weight": 0.3, "o_proj.weight": 0.5, "fc2.weight": 0.5,
}


def random_weight(slot: Slot, shape: torch.Size, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The random float32 tensor of a slot, scaled so that nothing collapses in a model of any width.

    It depends on the seed, the slot, the shape and the kind of device only.
    """
    part, name = slot
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{part}:{name}".encode()))
    random = torch.randn(shape, generator=generator, device=device)
    kind = name.rsplit(".", 1)[-1]
    if "norm" in name:
        return 1 + 0.1 * random if kind == "weight" else 0.02 * random
    if kind == "bias":
        return 0.02 * random
    if name == "position_embedding":  # below the patches' own content, so that unlike frames stay unlike
        return 0.5 * random
    if name in ("model.embed_tokens.weight", "image_newline"):
        return random
    scale = torch.tensor(next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0))
    if name == "lm_head.weight":  # words are said, bytes and pieces of words hardly ever
        scale = torch.full((shape[0], 1), 0.3)
        scale[demo_tokenizer.readable_ids()] = 3.0
    return scale * random * random[0].numel() ** -0.5


def fill(module: nn.Module, part: str, device: torch.device | str, seed: int, dtype: torch.dtype) -> None:
    """Random weights for a module on the meta device, in place; a tied head stays the embedding."""
    state = {
        name: random_weight((part, name), parameter.shape, seed, device).to(dtype)
        for name, parameter in module.named_parameters()
    }
    if part == "language" and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()


def random_vision(
    geometry: VisionGeometry, device: torch.device | str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Vision:
    """A tower with random weights, drawn in float32 on `device` and cast one by one."""
    with torch.device("meta"):
        vision = Vision(geometry)
    fill(vision, "vision", device, seed, dtype)
    return vision
