"""What a call of a live model says about videos: the arguments of transformers' LlavaOnevision and of LLaVA-NeXT's
LlavaQwen, brought into one form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .language.prompt import VIDEO_TOKEN, embed_batch
from .language.versions import needs_five
from .vision.geometry import VisionGeometry, pooled_grid

Encode = Callable[[Tensor], Tensor]  # normalised pixels [T, 3, H, W] of one video -> visual tokens [N, L]

# What transformers' get_image_features takes; it encodes images as it does without EarlyTom.
IMAGE_ARGUMENTS = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy",
                   "vision_aspect_ratio", "batch_num_images")


@dataclass(frozen=True)
class VideoCall:
    """A call that is about videos.

    prompts: the ids [P] of each, without padding, -200 for each visual; visuals: the tokens [N, L] that stand there;
    videos: which of them are videos and may be merged inside the LLM (images are not); rest: the other arguments; ids
    [B, P]: what the answer begins with, or None.
    """

    prompts: tuple[Tensor, ...]
    visuals: tuple[tuple[Tensor, ...], ...]
    videos: tuple[tuple[bool, ...], ...]
    rest: Mapping[str, Any]
    ids: Tensor | None

    def embed(self, language: Any) -> dict[str, Any]:
        """What Qwen2's forward and generate take for it."""
        prepared = embed_batch(language, self.prompts, self.visuals)
        for sample, videos in enumerate(self.videos):
            for k, video in enumerate(videos):
                prepared["visual_spans"][sample, k, 1] *= int(video)
        return prepared


def by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `method` by their names. Raises TypeError on one too many, as the call would."""
    signature = inspect.signature(method)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def transformers_call(model: Any, given: dict[str, Any], geometry: VisionGeometry, encode: Encode) -> VideoCall | None:
    """The call of a LlavaOnevision with the arguments `given`, or None when there is no video. Raises InputError.

    A run of video placeholders is one video, or several if it is a multiple of what the unpruned model takes for one.
    """
    pixels = given.pop("pixel_values_videos", None)
    if pixels is None:
        return None
    ids = given.pop("input_ids", None)
    ids = given.pop("inputs", None) if ids is None else ids
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError("with EarlyTom a video goes with input_ids [B, P], whose video tokens say where it stands")
    if pixels.dim() != 5:
        raise InputError(f"pixel_values_videos has shape {list(pixels.shape)}, it must be [videos, T, 3, H, W]")
    images = {name: given.pop(name) for name in IMAGE_ARGUMENTS if given.get(name) is not None}
    image_id, video_id = (placeholder(model.config, kind) for kind in ("image", "video"))
    features = None
    if "pixel_values" in images:
        needs_five("an image beside a video")
        features = torch.cat(list(model.get_image_features(**images, return_dict=True).pooler_output))
    whole = pixels.shape[1] * pooled_grid(geometry.grid, "bilinear") ** 2 + 1

    prompts, visuals, seen, placed = [], [], 0, 0  # visuals: numbers of videos and features of images, in order
    for row in _unpadded(ids, given.pop("attention_mask", None)):
        prompt: list[int] = []
        standing: list[int | Tensor] = []
        for token, run in groupby(row.tolist()):
            count = sum(1 for _ in run)
            if token == video_id:
                videos = count // whole if count % whole == 0 else 1
                standing += range(seen, seen + videos)
                prompt += [VIDEO_TOKEN] * videos
                seen += videos
            elif token == image_id and features is not None:
                standing.append(features[placed : placed + count])
                prompt.append(VIDEO_TOKEN)
                placed += count
            else:
                prompt += [token] * count
        prompts.append(torch.tensor(prompt))
        visuals.append(standing)
    if seen != len(pixels):
        raise InputError(
            f"the prompts hold {seen} videos and pixel_values_videos {len(pixels)}: each must be a run of the token "
            f"{video_id}, without a gap"
        )
    if features is not None and placed != len(features):
        raise InputError(f"the prompts hold {placed} image tokens, and the images make {len(features)}")
    given = {name: value for name, value in given.items() if name not in ("image_sizes_videos", "position_ids")}
    tokens = [encode(video) for video in pixels]
    return VideoCall(
        tuple(prompts),
        tuple(tuple(tokens[x] if isinstance(x, int) else x for x in standing) for standing in visuals),
        tuple(tuple(isinstance(x, int) for x in standing) for standing in visuals),
        given,
        ids,
    )


def placeholder(config: Any, kind: str) -> int:
    """The id that stands for a token of an "image" or a "video" in prompts; transformers renamed it in 4.52."""
    found: int | None = getattr(config, f"{kind}_token_id", None)
    return int(getattr(config, f"{kind}_token_index")) if found is None else found


def llava_next_call(given: dict[str, Any], encode: Encode) -> VideoCall | None:
    """The call of a LlavaQwen with the arguments `given`, or None when there is no video. Raises InputError."""
    modalities = given.get("modalities") or ()
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    if given.get("images") is None or "video" not in modalities:
        return None
    if modalities != {"video"}:  # LLaVA-NeXT has no way to encode the images alone
        raise InputError(
            f"with EarlyTom a call of a LLaVA-NeXT model takes videos alone, not {' and '.join(sorted(modalities))}: "
            "ask about the images in another call"
        )
    ids = given.pop("inputs", None)
    ids = given.pop("input_ids", None) if ids is None else ids
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError(f"with EarlyTom a video goes with ids [B, P] that hold {VIDEO_TOKEN} where it stands")
    rows = _unpadded(ids, given.pop("attention_mask", None))
    counts = [int((row == VIDEO_TOKEN).sum()) for row in rows]
    videos = [video if isinstance(video, Tensor) else torch.stack(list(video)) for video in given.pop("images")]
    if sum(counts) != len(videos):
        raise InputError(f"the prompts hold {sum(counts)} videos ({VIDEO_TOKEN}), and {len(videos)} were passed")
    tokens = iter([encode(video) for video in videos])
    given = {name: value for name, value in given.items() if name not in ("modalities", "image_sizes", "position_ids")}
    return VideoCall(
        tuple(rows),
        tuple(tuple(next(tokens) for _ in range(count)) for count in counts),
        tuple((True,) * count for count in counts),
        given,
        None,
    )


def _unpadded(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows of ids [B, N] less what mask [B, N] hides."""
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]
