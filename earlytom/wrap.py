"""`earlytom(model)`: EarlyTom on a model that is loaded already, that instance only, until `restore(model)`.

The model keeps its class, modules and weights. What changes is that its `generate` and `forward`, when they are given
a video, encode it with EarlyTom's tower and answer with Qwen2 and inner merging, both built over the same tensors.
Everything else goes to the model's own methods.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveTower
from .bundled import BundleEncoder
from .calls import VideoCall, by_name, llava_next_call, transformers_call
from .checkpoint import SharedParts, live_config, share_weights
from .checkpoint.formats import CheckpointConfig
from .config import EarlyTomConfig
from .errors import ConfigError, InputError
from .language.qwen2 import Qwen2, check_layer
from .language.versions import DYNAMIC_CACHE, STATIC_CACHES
from .presets import environment_settings, preset
from .tower import StaticTower, split_videos

METHODS = ("generate", "forward")


def earlytom(
    model: nn.Module,
    retain: float | None = None,
    *,
    bundle: str | Path | None = None,
    engine: str = "auto",
    config: EarlyTomConfig | None = None,
    environ: Mapping[str, str] = os.environ,
    **settings: Any,
) -> nn.Module:
    """Give `model` EarlyTom and return it; `restore` takes it back.

    model: a transformers LlavaOnevisionForConditionalGeneration, or LLaVA-NeXT's LlavaQwenForCausalLM (known by the
    names of its modules), on one device, or spread and offloaded by accelerate (`device_map=`) with its vision tower,
    projector and newline on one. retain: share of the visual tokens to keep (default 0.2). settings: of
    EarlyTomConfig; or a whole `config`. Without one, the published VideoMME settings hold, overridden by the released
    code's environment variables, read here and now, overridden by what is passed.

    Videos may have any number of frames, and how many of them are left follows from the data, as in the released code.
    With `frame_budgets`, or a whole `config`, which has them, the static form answers, as an engine would: videos must
    then have `frames` frames.

    bundle: of an exported tower, whose `engine` (see `engines.open_runner`) encodes videos in place of the model's own;
    what it was exported with is the configuration, and nothing else can be set. The engine is closed by `restore`.

    Raises ConfigError on settings that do not fit the model, InputError on another kind of model, or on one whose
    weights lie otherwise; with a bundle BundleError and EngineError as well.
    """
    restore(model)
    live = live_config(model)
    encoder = None
    if bundle is not None:
        if retain is not None or config is not None or settings:
            raise ConfigError("a bundle has its own configuration: leave out retain, config and other settings")
        encoder = BundleEncoder(bundle, engine, live)
        config = encoder.config
    try:
        wrapper = Wrapper(model, live, retain, config, environ, settings, encoder)
    except BaseException:
        if encoder is not None:
            encoder.close()
        raise
    for name, method in (("generate", wrapper.generate), ("forward", wrapper.forward)):
        # On the instance: nn.Module keeps plain functions out of its parameters and state_dict. Callers look at the
        # signature (generate does, for what the model takes), and copies of the model must call their own wrapper.
        setattr(model, name, update_wrapper(partial(method), wrapper.own[name]))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `earlytom(model)`; a model that is not wrapped stays as it is."""
    for name in METHODS:
        wrapper = getattr(getattr(model.__dict__.get(name), "func", None), "__self__", None)
        if isinstance(wrapper, Wrapper):
            wrapper.restored = True  # a hook that others have put over ours since keeps calling ours
            if name in wrapper.before:
                setattr(model, name, wrapper.before[name])
            else:
                delattr(model, name)
            if wrapper.encoder is not None:
                wrapper.encoder.close()
    return model


class Wrapper:
    """The methods that `earlytom` puts in place, and what they share."""

    def __init__(
        self,
        model: nn.Module,
        live: CheckpointConfig,
        retain: float | None,
        config: EarlyTomConfig | None,
        environ: Mapping[str, str],
        settings: dict[str, Any],
        encoder: BundleEncoder | None = None,
    ) -> None:
        if config is not None and (retain is not None or settings):
            raise ConfigError("give either a whole config, or retain and single settings, not both")
        self.live, self.encoder = live, encoder
        self.model: Any = model
        self.own: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in METHODS}
        self.before = {name: model.__dict__[name] for name in METHODS if name in model.__dict__}  # hooks of others
        self.restored = False
        self.shared: SharedParts | None = None
        self.static = config is not None or settings.get("frame_budgets") is not None
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
        _, language = self._parts()  # settings that do not fit are refused now, not at the first video
        if config.inner is not None:
            check_layer(language.config, config.inner)

    def _parts(self) -> tuple[AdaptiveTower | StaticTower, Qwen2]:
        """Tower and Qwen2 over the model's tensors, made anew when it was moved or cast since."""
        if self.shared is None or not self.shared.same_weights(self.model):
            self.shared = share_weights(self.model, self.live)
            self.tower = (StaticTower if self.static else AdaptiveTower)(self.shared.vision, self.config)
        return self.tower, self.shared.language

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [T, 3, H, W] of one video -> its visual tokens [N, L]. Raises InputError."""
        tower, _ = self._parts()
        if self.encoder is not None:
            return self.encoder.encode(pixels, tower.vision.image_newline)
        if isinstance(tower, AdaptiveTower):
            return tower.encode_pixels(pixels).tokens
        if len(pixels) != self.config.frames:
            raise InputError(
                f"a video has {len(pixels)} frames and the frame budgets are for {self.config.frames}: pass as many, "
                "or no budgets, so that frame counts follow the data"
            )
        outputs = tower.encode_pixels(pixels[None].to(tower.vision.device))
        (video,) = split_videos(outputs, tower.config, tower.shapes.pooled_grid)
        return video.tokens

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate; with a video, through EarlyTom."""
        call = self._video_call("generate", args, kwargs)
        if call is None:
            return self.own["generate"](*args, **kwargs)
        _, language = self._parts()
        language.generation_config = self.model.generation_config
        rest = dict(call.rest)
        if call.ids is not None:  # the model counts its prompt's ids, and Qwen2 the fewer embeddings
            for bound in ("max", "min"):
                if (length := rest.pop(f"{bound}_length", None)) is not None:
                    rest.setdefault(f"{bound}_new_tokens", length - call.ids.shape[1])
        sources = (rest.get("cache_implementation"), rest.get("generation_config"), self.model.generation_config)
        if self.config.inner is not None and _asks_static_cache(*sources):
            warnings.warn("with inner merging the layers' caches differ in length: using a dynamic cache", stacklevel=2)
            rest["cache_implementation"] = DYNAMIC_CACHE
        new = language.generate(**call.embed(language), inner=self.config.inner, **rest)
        if call.ids is None:
            return new
        answers = new if isinstance(new, Tensor) else new.sequences
        ids = call.ids.to(answers.device)
        answers = torch.cat([ids.repeat_interleave(len(answers) // len(ids), dim=0), answers], dim=-1)
        if isinstance(new, Tensor):
            return answers
        new.sequences = answers
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; a prefill with a video goes through EarlyTom: logits over the tokens that are left."""
        call = self._video_call("forward", args, kwargs)
        if call is None:
            return self.own["forward"](*args, **kwargs)
        if call.rest.get("labels") is not None:
            raise InputError("labels cannot go with a video: EarlyTom leaves fewer tokens than they are for")
        _, language = self._parts()
        return language(**call.embed(language), inner=self.config.inner, **call.rest)

    def _video_call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VideoCall | None:
        """What the call of that method says, or None when it is not about videos."""
        if self.restored:
            return None
        given = by_name(self.own[method], args, kwargs)
        if self.live.format == "transformers":
            return transformers_call(self.model, given, self.live.geometry, self.encode)
        return llava_next_call(given, self.encode)


def _asks_static_cache(implementation: str | None, *configs: Any) -> bool:
    """Whether the first of these that names a cache names one whose layers have one length."""
    named = (implementation, *(getattr(config, "cache_implementation", None) for config in configs))
    return next((name for name in named if name is not None), None) in STATIC_CACHES
