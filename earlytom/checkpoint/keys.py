"""Names of weights: one table for each checkpoint format, and strict matching of what is stored with what is needed.

A weight is known here by its slot: the part of the model it belongs to, and its parameter name in that part's module,
`earlytom.vision.siglip.Vision` or `earlytom.language.qwen2.Qwen2`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointError

PARTS = ("vision", "language")
READABLE = ("BF16", "F16", "F32", "F64")  # safetensors' names of the dtypes that can be cast to what is asked for

Slot = tuple[str, str]  # (part, parameter name)

# Names inside SigLIP's vision model -> names in Vision. Names are rewritten from their start; {i} is a layer number.
# Source: transformers' modeling_siglip.py, whose names LLaVA-NeXT's siglip_encoder.py shares.
_SIGLIP = (
    ("embeddings.patch_embedding.", "patch_embedding."),
    ("embeddings.position_embedding.weight", "position_embedding"),
    ("encoder.layers.{i}.layer_norm1.", "layers.{i}.norm1."),
    ("encoder.layers.{i}.self_attn.", "layers.{i}.attention."),
    ("encoder.layers.{i}.layer_norm2.", "layers.{i}.norm2."),
    ("encoder.layers.{i}.mlp.", "layers.{i}."),
    ("", "siglip."),  # everything else of it: not a parameter of Vision, some of it rightly unused
)


def _tower(prefix: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((prefix + theirs, "vision", ours) for theirs, ours in _SIGLIP)


# Format -> (name in the file, part, name in the part), rewritten from the start; the first that fits counts. Of several
# spellings of one weight the first is the one that published files have, and the one that is written.
TABLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    # Source: the modules of LLaVA-NeXT's llava_arch.py and llava_qwen.py.
    "llava-next": (
        *_tower("model.vision_tower.vision_tower.vision_model."),
        *_tower("model.vision_tower.vision_tower."),  # saved around transformers >= 5, which has no `vision_model`
        ("model.mm_projector.0.", "vision", "linear_1."),
        ("model.mm_projector.2.", "vision", "linear_2."),
        ("model.mm_projector.", "vision", "mm_projector."),
        ("model.image_newline", "vision", "image_newline"),
        ("model.", "language", "model."),
        ("lm_head.", "language", "lm_head."),
    ),
    # Source: transformers' modeling_llava_onevision.py. In this order: hub files, what transformers 5 saves (it has no
    # `vision_model` any more), and the names its modules have since 4.52, which save_pretrained may write as well.
    "transformers": (
        *_tower("vision_tower.vision_model."),
        *_tower("vision_tower."),
        *_tower("model.vision_tower.vision_model."),
        *_tower("model.vision_tower."),
        ("multi_modal_projector.linear_", "vision", "linear_"),
        ("model.multi_modal_projector.linear_", "vision", "linear_"),
        ("image_newline", "vision", "image_newline"),
        ("model.image_newline", "vision", "image_newline"),
        ("language_model.model.", "language", "model."),
        ("language_model.lm_head.", "language", "lm_head."),
        ("model.language_model.", "language", "model."),
        ("lm_head.", "language", "lm_head."),
    ),
}


def _rewriter(before: str, after: str) -> Callable[[str], str | None]:
    """A function that replaces a name's start `before` by `after`, layer number included, or returns None."""
    pattern = re.compile(re.escape(before).replace(r"\{i\}", r"(\d+)"))
    template = after.replace("{i}", r"\1")

    def rewrite(name: str) -> str | None:
        found = pattern.match(name)
        return None if found is None else found.expand(template) + name[found.end() :]

    return rewrite


_READ = {f: [(_rewriter(theirs, ours), part) for theirs, part, ours in t] for f, t in TABLES.items()}
_WRITE = {f: [(_rewriter(ours, theirs), part) for theirs, part, ours in t] for f, t in TABLES.items()}


def locate(key: str, format: str) -> Slot | None:
    """Where the tensor that a checkpoint calls `key` belongs, or None for a name that no table knows.

    The tower's tensors that Vision does not have come back as ("vision", "siglip.<name in SigLIP>").
    """
    for rewrite, part in _READ[format]:
        name = rewrite(key)
        if name is not None:
            return part, name
    return None


def key_of(slot: Slot, format: str) -> str:
    """The name that published checkpoints of `format` give to a slot: the inverse of `locate`."""
    for rewrite, part in _WRITE[format]:
        key = rewrite(slot[1]) if part == slot[0] else None
        if key is not None and locate(key, format) == slot:
            return key
    raise KeyError(slot)


def wanted(key: str, format: str, parts: Sequence[str], *, unknown: bool = False) -> bool:
    """Whether a tensor belongs to one of `parts`; `unknown` is the answer for a name that no table knows."""
    slot = locate(key, format)
    return unknown if slot is None else slot[0] in parts


@dataclass(frozen=True)
class Stored:
    """What a safetensors header says of one tensor: dtype by safetensors' name, and which bytes of the file hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Unused:
    """Which tensors a checkpoint may hold without their being needed.

    used_layers, stored_layers: SigLIP layers that Vision has, and that the checkpoint's own vision configuration has
    (LLaVA takes the feature before the last of them); tied: the LLM's head is its embedding.
    """

    used_layers: int
    stored_layers: int
    tied: bool = False

    def __call__(self, slot: Slot) -> bool:
        part, name = slot
        if part == "language":
            return (self.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer:
            return self.used_layers <= int(layer[1]) < self.stored_layers
        return name.startswith(("siglip.post_layernorm.", "siglip.head.")) or name == "siglip.embeddings.position_ids"


def match(
    where: str,
    stored: Mapping[str, Stored],
    needed: Mapping[Slot, tuple[int, ...]],
    *,
    format: str,
    unused: Unused,
    optional: Iterable[Slot] = (),
) -> dict[Slot, str]:
    """The stored name of every needed slot.

    where: what to call the checkpoint in errors; stored: name -> dtype and shape of the tensors of the parts asked for,
    and of every tensor of an unknown name; needed: slot -> shape; optional: slots that may be missing.
    Raises one CheckpointError that lists all missing, unexpected, misshapen and unreadable tensors.
    """
    found: dict[Slot, str] = {}
    unexpected, misshapen, unreadable = [], [], []
    for key, tensor in stored.items():
        slot = locate(key, format)
        if slot is not None and unused(slot):
            continue
        if slot is None or slot not in needed:
            unexpected.append(key)
            continue
        if slot in found:
            unexpected.append(f"{key} beside {found[slot]}")
            continue
        found[slot] = key
        if tensor.shape != tuple(needed[slot]):
            misshapen.append(f"{key} is {list(tensor.shape)}, not {list(needed[slot])}")
        if tensor.dtype not in READABLE:
            unreadable.append(f"{key} is {tensor.dtype}")
    missing = [key_of(slot, format) for slot in needed if slot not in found and slot not in set(optional)]
    complaints = [
        f"{len(names)} {title} ({summarise(names)})"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            (f"of a dtype other than {', '.join(READABLE)}", unreadable),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"the tensors of {where} do not fit its configuration: {'; '.join(complaints)}")
    return found


def summarise(names: list[str], most: int = 24) -> str:
    """All names; when there are more than `most`, those that differ in a layer number only become one with a `*`."""
    if len(names) <= most:
        return ", ".join(names)
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    texts = [group[0] if len(group) == 1 else f"{shape} x {len(group)}" for shape, group in groups.items()]
    return ", ".join(texts[: 4 * most]) + (f", and {len(texts) - 4 * most} more" if len(texts) > 4 * most else "")
