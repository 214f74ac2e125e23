"""What differs between the releases of transformers that Qwen2 is built over: 4.49 to 4.57, and 5.

All that knows an older release is here. What it lacks is refused in one sentence by `needs_five`, never done otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, Qwen2Config
from transformers.generation import configuration_utils
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ..errors import ConfigError

FIVE = int(transformers.__version__.split(".")[0]) >= 5
_TAKES = inspect.signature(Qwen2DecoderLayer.forward).parameters
_CACHE = "past_key_values" if "past_key_values" in _TAKES else "past_key_value"
_F = TypeVar("_F", bound=Callable[..., Any])

if FIVE:
    from transformers.masking_utils import create_causal_mask
    from transformers.utils.output_capturing import capture_outputs
else:

    def capture_outputs(forward: _F) -> _F:
        return forward


# Names of generate's `cache_implementation`: those whose layers have one length, and one that goes without.
STATIC_CACHES = tuple(
    getattr(configuration_utils, "ALL_STATIC_CACHE_IMPLEMENTATIONS", None)
    or configuration_utils.NEED_SETUP_CACHE_CLASSES_MAPPING
)
DYNAMIC_CACHE = "dynamic" if "dynamic" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS else None


def needs_five(what: str) -> None:
    """Raise ConfigError where transformers is older than 5."""
    if not FIVE:
        raise ConfigError(f"{what} needs transformers 5, this is {transformers.__version__}")


def qwen2_config(text: Mapping[str, Any]) -> Qwen2Config:
    """Of the settings as transformers 5 names them, whose `rope_parameters` are two settings before."""
    settings = dict(text)
    if not FIVE:
        rope = dict(settings.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            settings["rope_theta"] = rope.pop("rope_theta")
        settings["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if not settings.get("use_sliding_window"):
            settings["sliding_window"] = None  # some releases take a window, 4096 by default, for one that is used
    return Qwen2Config(**settings)


def dynamic_cache(config: Qwen2Config) -> DynamicCache:
    """An empty cache that grows."""
    return DynamicCache(config=config) if FIVE else DynamicCache()


def has_windows(config: Any) -> bool:
    """Whether some layers of a Qwen2 have sliding windows, whose cache forgets what is far behind."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    used = config.use_sliding_window and config.sliding_window is not None
    return bool(used and config.max_window_layers < config.num_hidden_layers)


def cached_keys(cache: Cache | None, index: int) -> Tensor | None:
    """The keys [B, G, N, head width] of a layer as it has just cached them, or None where they are not at hand."""
    if cache is None or getattr(cache, "offloading", False):
        return None
    if not hasattr(cache, "layers"):  # before 4.54
        return cache.key_cache[index] if isinstance(cache, DynamicCache) else None
    layer = cache.layers[index]
    return layer.keys if type(layer).__name__ == "DynamicLayer" else None


def run_layer(layer: Any, hidden: Tensor, cache: Cache | None, **arguments: Any) -> Tensor:
    """Hidden states [B, N, D] behind a decoder layer."""
    out = layer(hidden, **{_CACHE: cache}, **arguments)
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states


def layer_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of a forward's further arguments is for its layers; an older release's own are not.

    Raises ConfigError where it is asked for what an older release gathers layer by layer.
    """
    if FIVE:
        return kwargs
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            needs_five(f"{name} with inner merging")
    ours = ("output_attentions", "output_hidden_states", "return_dict", "cache_position")
    return {name: value for name, value in kwargs.items() if name not in ours}


def causal_mask(
    config: Qwen2Config, hidden: Tensor, visible: Tensor | None, cache: Cache | None, layer: int = 0,
    position_ids: Tensor | None = None,
) -> Any:
    """What the layers from `layer` on take as attention_mask. visible [B, cached + N]: 0 for what nobody sees."""
    if FIVE:
        return create_causal_mask(
            config=config, inputs_embeds=hidden, attention_mask=visible, position_ids=position_ids,
            past_key_values=cache, layer_idx=layer,
        )
    past = 0 if cache is None else cache.get_seq_length(layer)
    return _causal_mask(hidden, visible, past, config._attn_implementation)


def _causal_mask(hidden: Tensor, visible: Tensor | None, past: int, attention: str) -> Tensor | None:
    """The same for releases whose own function cannot tell one layer's cache from another's."""
    if attention == "flash_attention_2":
        return None if visible is None or bool(visible.all()) else visible
    queries = hidden.shape[1]
    if visible is None and (queries == 1 or (attention == "sdpa" and not past)):
        return None  # everything is seen, or SDPA is causal by itself
    columns = torch.arange(past + queries, device=hidden.device)
    seen = columns <= columns[past:, None]  # [N, cached + N]
    seen = seen[None, None] if visible is None else seen & visible.to(hidden.device).bool()[:, None, None]
    return hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
