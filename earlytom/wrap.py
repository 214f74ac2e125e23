"""`earlytom(model)`: EarlyTom on a model that is loaded already, that instance only, until `restore(model)`.

The model keeps its class, modules and weights. What changes is that its `generate` and `forward`, when they are given
a video, encode it with the static tower and answer with Qwen2 and inner merging, both built over the same tensors.
Everything else goes to the model's own methods.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import SharedParts, share_weights
from .checkpoint_config import live_config
from .config import EarlyTomConfig, environment_settings, preset
from .errors import ConfigError, InputError
from .pipeline import split_videos
from .qwen2 import VIDEO_TOKEN, check_layer, embed_batch, generate
from .tower import StaticTower

METHODS = ("generate", "forward")


def earlytom(
    model: nn.Module,
    retain: float | None = None,
    *,
    config: EarlyTomConfig | None = None,
    environ: Mapping[str, str] = os.environ,
    **settings: Any,
) -> nn.Module:
    """Give `model` EarlyTom and return it; `restore` takes it back.

    model: a transformers LlavaOnevisionForConditionalGeneration, or LLaVA-NeXT's LlavaQwenForCausalLM (known by the
    names of its modules), on one device. retain: share of the visual tokens to keep (default 0.2). settings: of
    EarlyTomConfig; or a whole `config`. Without one, the published VideoMME settings hold, overridden by the released
    code's environment variables, read here and now, overridden by what is passed. The number of frames is that of each
    video; a fixed one is `config`'s budgets' only.

    Raises ConfigError on settings that do not fit the model, InputError on another kind of model.
    """
    restore(model)
    wrapper = Wrapper(model, retain, config, environ, settings)
    # On the instance: nn.Module keeps plain functions out of its parameters and state_dict.
    model.generate, model.forward = wrapper.generate, wrapper.forward  # type: ignore[assignment]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `earlytom(model)`; a model that is not wrapped stays as it is."""
    for name in METHODS:
        if isinstance(getattr(model.__dict__.get(name), "__self__", None), Wrapper):
            delattr(model, name)
    return model


class Wrapper:
    """The methods that `earlytom` puts in place, and what they share."""

    def __init__(
        self,
        model: nn.Module,
        retain: float | None,
        config: EarlyTomConfig | None,
        environ: Mapping[str, str],
        settings: dict[str, Any],
    ) -> None:
        if config is not None and (retain is not None or settings):
            raise ConfigError("give either a whole config, or retain and single settings, not both")
        self.live = live_config(model)
        self.model: Any = model
        self.own: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in METHODS}
        self.shared: SharedParts | None = None
        self.towers: dict[tuple[int, int], StaticTower] = {}
        if config is None:
            chosen = environment_settings(environ) | settings
            if retain is not None:
                chosen["retain"] = retain
            chosen = {"pooling": self.live.pooling, "newline": self.live.newline} | chosen
            config = preset(
                retain=chosen.pop("retain", 0.2),
                model="llava-video" if self.live.newline == "grid" else "llava-onevision",
                depth=self.live.geometry.layers,
                llm_layers=self.live.text["num_hidden_layers"],
                **chosen,
            )
        self.config = config
        vision, language = self._parts()
        if config.inner is not None:
            check_layer(language.config, config.inner)
        self._tower(1, config.frames)  # settings that do not fit are refused now, not at the first video

    def _parts(self) -> tuple[Any, Any]:
        """Vision and Qwen2 over the model's tensors, made anew when it was moved or cast since."""
        shared = self.shared
        if shared is None or not shared.same_weights(self.model):
            self.shared = shared = share_weights(self.model, self.live)
            self.towers.clear()
        return shared.vision, shared.language

    def _tower(self, videos: int, frames: int) -> StaticTower:
        """The static tower for this many videos of this many frames."""
        key = (videos, frames)
        if key not in self.towers:
            config = self.config if frames == self.config.frames else self.config.replace(frames=frames)
            vision, _ = self._parts()
            self.towers[key] = StaticTower(vision, config, batch=videos)
        return self.towers[key]

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pixels [V, T, 3, H, W] -> visual tokens [N, L] of each video."""
        vision, _ = self._parts()
        tower = self._tower(pixels.shape[0], pixels.shape[1])
        with torch.no_grad():
            outputs = tower.encode_pixels(pixels.to(vision.device))
        return [video.tokens for video in split_videos(outputs, tower.config, tower.shapes)]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate; with a video, through EarlyTom."""
        found = self._video_call(args, kwargs)
        if found is None:
            return self.own["generate"](*args, **kwargs)
        prompts, tokens, rest, ids = found
        _, language = self._parts()
        language.generation_config = self.model.generation_config
        limit = rest.pop("max_new_tokens", None) or getattr(rest.get("generation_config"), "max_new_tokens", None)
        limit = limit or getattr(self.model.generation_config, "max_new_tokens", None) or 20
        new = generate(language, prompts, tokens, inner=self.config.inner, max_new_tokens=limit, **rest)
        return new if ids is None else torch.cat([ids.to(new.device), new], dim=-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; a prefill with a video goes through EarlyTom: logits over the tokens that are left."""
        found = self._video_call(args, kwargs)
        if found is None:
            return self.own["forward"](*args, **kwargs)
        prompts, tokens, rest, _ = found
        _, language = self._parts()
        return language(**embed_batch(language, prompts, tokens), inner=self.config.inner, **rest)

    def _video_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Any], Tensor | None] | None:
        """Prompts with -200 for the video, visual tokens, the other arguments, and ids to put before the answer.

        None when the call is not about videos.
        """
        if self.live.format == "transformers":
            return self._transformers_call(args, dict(kwargs))
        return self._llava_next_call(args, dict(kwargs))

    def _transformers_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values_videos") is None:
            return None
        ids = args[0] if args else kwargs.pop("input_ids", kwargs.pop("inputs", None))
        if len(args) > 1 or ids is None or kwargs.get("pixel_values") is not None:
            raise InputError("with EarlyTom a video goes with input_ids and no image, all passed by name")
        pixels = kwargs.pop("pixel_values_videos")
        mask = kwargs.pop("attention_mask", None)
        for name in ("image_sizes", "image_sizes_videos", "batch_num_images", "position_ids"):
            kwargs.pop(name, None)
        placeholder = self.model.config.video_token_id
        prompts = [_mark_video(row, placeholder) for row in _unpadded(ids, mask, len(pixels))]
        return prompts, self.encode(pixels), kwargs, ids

    def _llava_next_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        images, modalities = kwargs.get("images"), kwargs.get("modalities")
        modalities = [modalities] if isinstance(modalities, str) else list(modalities or ())
        if images is None or not modalities or set(modalities) != {"video"}:
            return None
        ids = args[0] if args else kwargs.pop("inputs", kwargs.pop("input_ids", None))
        if len(args) > 1 or ids is None:
            raise InputError("with EarlyTom a video goes with the prompt's ids first, and the rest passed by name")
        mask = kwargs.pop("attention_mask", None)
        for name in ("images", "modalities", "image_sizes", "position_ids"):
            kwargs.pop(name, None)
        videos = [video if isinstance(video, Tensor) else torch.stack(list(video)) for video in images]
        rows = _unpadded(ids, mask, len(videos))
        if len({len(video) for video in videos}) == 1:
            tokens = self.encode(torch.stack(videos))
        else:
            tokens = [self.encode(video[None])[0] for video in videos]
        return rows, tokens, kwargs, None


def _unpadded(ids: Tensor, mask: Tensor | None, videos: int) -> list[Tensor]:
    """The rows of ids [B, N] less what mask [B, N] hides. Raises InputError unless there is one for each video."""
    if len(ids) != videos:
        raise InputError(f"{len(ids)} prompts do not go with {videos} videos: one video for each prompt")
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]


def _mark_video(ids: Tensor, placeholder: int) -> Tensor:
    """Ids [P] with the one run of `placeholder` replaced by a single -200. Raises InputError."""
    at = (ids == placeholder).nonzero().flatten()
    if not len(at) or int(at[-1] - at[0]) != len(at) - 1:
        raise InputError(f"a prompt must hold one video: the token {placeholder}, repeated without a gap")
    first, last = int(at[0]), int(at[-1])
    return torch.cat([ids[:first], ids.new_tensor([VIDEO_TOKEN]), ids[last + 1 :]])

