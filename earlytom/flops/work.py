"""The work of a whole answer by part, before and after EarlyTom: FLOPs, and the bytes that cross the card's memory.

Vision, projector and prefill run one after the other up to the first token; decode is the step of the second one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..config import EarlyTomConfig
from ..dtypes import check_dtype
from ..language.geometry import LanguageGeometry
from ..shapes import StaticShapes, derive_shapes
from ..vision.geometry import VisionGeometry
from .cost import encoder_weight_count, projector_weight_count
from .language import Prompt, cached_tokens, language_decode, language_prefill, layer_weight_count
from .tower import tower_flops, unpruned_config

TEXT_TOKENS = 32  # of a prompt: the chat form that LLaVA was trained with takes 20, a short question a dozen


@dataclass(frozen=True)
class Work:
    """FLOPs of one part, and the bytes it moves.

    flops: with the whole square of causal attention; masked_flops: those of them that the mask hides and a kernel may
    skip. weight_bytes: read once a pass, of the embedding the rows that are looked up; cache_bytes: keys and values
    written and, by decoding, read. activation_bytes: an estimate, for the chip may keep what lies between two kernels:
    each matrix product reads its input and writes its output once, with the element-wise work in it, and attention is
    fused, but for the one layer of the tower that forms its matrix.
    """

    flops: int
    masked_flops: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def least_flops(self) -> int:
        return self.flops - self.masked_flops

    @property
    def least_bytes(self) -> int:
        """What has to move whatever is kept on the chip."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class CallWork:
    """The parts of one call; prefill and decode are None where the LLM's sizes are not known."""

    vision: Work
    projector: Work
    prefill: Work | None = None
    decode: Work | None = None

    @property
    def parts(self) -> Iterator[tuple[str, Work]]:
        """Name and work of each part that is known, in the order in which they run."""
        known = {"vision": self.vision, "projector": self.projector, "prefill": self.prefill, "decode": self.decode}
        return ((name, work) for name, work in known.items() if work is not None)

    @property
    def to_first_token(self) -> tuple[Work, ...]:
        """All parts but decode."""
        return tuple(work for name, work in self.parts if name != "decode")


@dataclass(frozen=True)
class ModelWork:
    """A call with nothing pruned, and with EarlyTom, for prompts of `text_tokens` beside the video."""

    text_tokens: int
    before: CallWork
    after: CallWork

    @property
    def parts(self) -> Iterator[tuple[str, Work, Work]]:
        """Name of each part, its work before and after."""
        return ((name, before, after) for (name, before), (_, after) in zip(self.before.parts, self.after.parts))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: {"text_tokens", part: {"before": {...}, "after": {...}}}."""
        found: dict[str, Any] = {"text_tokens": self.text_tokens}
        return found | {
            name: {"before": asdict(before), "after": asdict(after)} for name, before, after in self.parts
        }


def model_work(
    config: EarlyTomConfig,
    geometry: VisionGeometry,
    language: LanguageGeometry | None,
    *,
    text_tokens: int = TEXT_TOKENS,
    batch: int = 1,
    dtype: str = "fp32",
) -> ModelWork:
    """The work of a call of `batch` videos, each in a prompt of its own, with weights and activations in `dtype`.

    language: None where it is not known. Raises ConfigError when the configuration does not fit one of the two.
    """
    size = check_dtype(dtype).bytes
    calls = (_call(each, geometry, language, text_tokens, batch, size) for each in (unpruned_config(config), config))
    return ModelWork(text_tokens, *calls)


def _call(
    config: EarlyTomConfig, geometry: VisionGeometry, language: LanguageGeometry | None, text: int, batch: int,
    size: int,
) -> CallWork:
    shapes, flops = derive_shapes(config, geometry, batch), tower_flops(config, geometry, batch)
    vision = Work(
        flops.vision, 0, encoder_weight_count(geometry) * size, 0,
        batch * _vision_bytes(config, geometry, shapes, size),
    )
    projector = Work(
        flops.projector, 0, projector_weight_count(geometry) * size, 0, batch * _projector_numbers(shapes) * size
    )
    if language is None:
        return CallWork(vision, projector)
    prompt = Prompt(text, shapes.tokens, config.inner)
    kept, entry = cached_tokens(language, prompt), 2 * language.kv_size * size  # keys and values of a token in a layer
    full, causal = (language_prefill(language, prompt, batch=batch, causal=each).total for each in (False, True))
    prefill = Work(
        full,
        full - causal,
        _weights_read(language, batch * text) * size,
        batch * kept * entry,
        batch * kept * _token_numbers(language) * size,
    )
    decode = Work(
        language_decode(language, prompt, batch=batch).total,
        0,
        _weights_read(language, batch) * size,
        batch * (kept + language.layers) * entry,
        batch * language.layers * _token_numbers(language) * size,
    )
    return CallWork(vision, projector, prefill, decode)


def _weights_read(language: LanguageGeometry, rows: int) -> int:
    """Numbers read in a pass: layers, norm and head whole, of the embedding only so many rows."""
    d = language.hidden_size
    return language.layers * layer_weight_count(language) + d + language.vocabulary * d + rows * d


def _token_numbers(language: LanguageGeometry) -> int:
    """In and out of the products of a decoder layer and its attention, two residuals; keys and values written apart."""
    return 6 * language.hidden_size + 4 * language.query_size + 2 * language.kv_size + 3 * language.intermediate_size


def _vision_bytes(config: EarlyTomConfig, geometry: VisionGeometry, shapes: StaticShapes, size: int) -> int:
    """Of one video: frames in, the layers, and what merging reads and writes."""
    d, s = geometry.hidden_size, geometry.patches
    ends = (*config.merge_layers, geometry.layers - 1)
    starts = (0, *(end + 1 for end in ends))
    layers = sum(frames * (end + 1 - start) for frames, start, end in zip(shapes.stage_frames, starts, ends))
    numbers = layers * s * (14 * d + 2 * geometry.intermediate_size) + config.frames * s * d
    numbers += sum(s * d * (2 * a + b) for a, b in zip(shapes.stage_frames, shapes.stage_frames[1:]))
    pixels = 3 * config.frames * geometry.image_size**2
    matrix = shapes.stage_frames[-2] * geometry.heads * s * s if config.merge_layers else 0
    return numbers * size + pixels + matrix * 2 * (size + 4)  # product, softmax in float32, each there and back


def _projector_numbers(shapes: StaticShapes) -> int:
    """Of one video: features in, the wide ones out and into the pooling, tokens out of it and through the second."""
    per_frame = shapes.patches * (shapes.hidden_size + 2 * shapes.projector_size)
    per_frame += (shapes.pooled_patches + 2 * shapes.keep) * shapes.projector_size
    return shapes.final_frames * per_frame
