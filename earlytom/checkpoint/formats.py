"""What a checkpoint's JSON files say, for both formats, brought into one form. Nothing here touches a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError, ConfigError, InputError
from ..language.geometry import LanguageGeometry
from ..vision.geometry import VisionGeometry
from .files import read_json

# SigLIP so400m-patch14-384, by the names of its configuration. LLaVA-NeXT checkpoints name it and do not repeat this.
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
}
BUILT_IN_TOWERS = {"siglip-so400m-patch14-384": SO400M}  # by the last component of the name
# What transformers' SiglipVisionConfig assumes where a configuration is silent.
SIGLIP_DEFAULTS: dict[str, Any] = SO400M | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16,
}
# What both formats tell about Qwen2; the rotary embedding apart, names are those of transformers' Qwen2Config.
QWEN2_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "use_sliding_window",
    "sliding_window", "max_window_layers", "layer_types", "attention_dropout", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id",
)
QWEN2_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
QWEN2_SIZES = ("vocab_size", "num_key_value_heads")  # may be silent
# Far above every model there is, low enough that making modules without weights neither overflows nor takes minutes.
MOST = {"num_hidden_layers": 1024, "image_size": 2**14, "patch_size": 2**14, "vocab_size": 2**31}
SUPPORTED = "LlavaQwenForCausalLM (LLaVA-NeXT) and LlavaOnevisionForConditionalGeneration (transformers)"


@dataclass(frozen=True)
class CheckpointConfig:
    """One checkpoint's configuration.

    format: "llava-next" or "transformers"; stored_layers: SigLIP layers its vision configuration has, of which
    geometry.layers are used; pooling, newline: as in Vision; has_newline: whether there must be a newline embedding;
    text: keyword arguments for Qwen2Config, without vocab_size where the checkpoint does not tell it; source: the JSON
    that all of this was read from.
    """

    format: str
    geometry: VisionGeometry
    stored_layers: int
    pooling: str
    newline: str
    has_newline: bool
    text: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    source: dict[str, Any]

    @property
    def tied(self) -> bool:
        return bool(self.text["tie_word_embeddings"])

    @property
    def language(self) -> LanguageGeometry | None:
        """Sizes of the LLM; None where the files are silent on one, or they are no Qwen2's: loading it tells why."""
        width, heads = self.text["hidden_size"], self.text["num_attention_heads"]
        if width % heads or any(name not in self.text for name in QWEN2_SIZES):
            return None
        try:
            return LanguageGeometry(
                self.text["num_hidden_layers"], width, heads, self.text["num_key_value_heads"], width // heads,
                self.text["intermediate_size"], self.text["vocab_size"], self.tied,
            )
        except ConfigError:
            return None


def read_config(directory: Path) -> CheckpointConfig:
    """The configuration of the checkpoint in `directory`. Raises CheckpointError when it is not one we can load."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json, so it is not the directory of a checkpoint")
    config = read_json(directory / "config.json")
    architectures = config.get("architectures") or []
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    kind = architecture or str(config.get("model_type"))
    try:
        if kind in ("LlavaQwenForCausalLM", "llava_qwen"):
            return _llava_next(directory, config)
        if kind in ("LlavaOnevisionForConditionalGeneration", "llava_onevision"):
            return _transformers(directory, config)
    except ConfigError as error:  # sizes that VisionGeometry refuses
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
    raise CheckpointError(f"{directory} holds a {kind}; what can be loaded is {SUPPORTED}")


def live_config(model: Any) -> CheckpointConfig:
    """The configuration of a loaded model: transformers' LlavaOnevision, or LLaVA-NeXT's LlavaQwen by its modules.

    Raises InputError on another kind of model, CheckpointError on settings that are not implemented.
    """
    inner = getattr(model, "model", None)
    where = Path(f"<{type(model).__name__}>")
    try:
        if getattr(getattr(model, "config", None), "model_type", None) == "llava_onevision":
            return _transformers(where, model.config.to_dict())
        if all(hasattr(inner, name) for name in ("vision_tower", "mm_projector", "embed_tokens")):
            tower = getattr(inner, "vision_tower")  # noqa: B009
            tower = tower[0] if isinstance(tower, list) else tower
            # Of the tower itself: what holds it says so400m whatever it holds.
            config = getattr(getattr(tower, "vision_tower", None), "config", tower.config)
            return _llava_next(where, model.config.to_dict(), SO400M | config.to_dict())
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    raise InputError(
        f"the model is a {type(model).__name__}, EarlyTom takes transformers' LlavaOnevisionForConditionalGeneration "
        "and LLaVA-NeXT's LlavaQwenForCausalLM"
    )


def _llava_next(
    directory: Path, config: Mapping[str, Any], vision: dict[str, Any] | None = None
) -> CheckpointConfig:
    """LLaVA-NeXT: one flat configuration, and a vision tower by name, or its configuration `vision`.

    Source: llava_arch.py, siglip_encoder.py (which always drops the last layer) and the projector's builder.py.
    """
    where = directory / "config.json"
    _require(where, config, "mm_projector_type", ("mlp2x_gelu",), default="linear")
    _require(where, config, "mm_vision_select_layer", (-2,), default=-2)
    _require(where, config, "mm_spatial_pool_stride", (2, None), default=2)
    _require(where, config, "add_faster_video", (False, None), default=False)
    merge = config.get("mm_patch_merge_type", "flat")
    if not isinstance(merge, str) or not (merge == "flat" or merge.startswith("spatial")):
        raise CheckpointError(f"{where}: mm_patch_merge_type is {merge!r}, it must be flat or begin with spatial")
    newline = _require(where, config, "mm_newline_position", ("one_token", "grid", "no_token"), default="one_token")
    has_newline = "unpad" in merge
    if newline == "grid" and merge != "flat" and not has_newline:
        raise CheckpointError(f"{where}: mm_newline_position is 'grid', but {merge!r} merging has no newline embedding")
    if vision is None:
        vision = _tower_config(directory, config.get("mm_vision_tower", config.get("vision_tower")))
    stored = _integer(where, vision, "num_hidden_layers")
    return CheckpointConfig(
        format="llava-next",
        geometry=_geometry(where, vision, layers=stored - 1, projector_size=_integer(where, config, "hidden_size")),
        stored_layers=stored,
        pooling=_require(
            where, config, "mm_spatial_pool_mode", ("bilinear", "average", "max", None), default="bilinear"
        ) or "bilinear",
        newline=newline if has_newline else "no_token",
        has_newline=has_newline,
        text=_text(where, config, tied=config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos(directory, config),
        source={"config": dict(config), "vision_config": vision},
    )


def _tower_config(directory: Path, name: Any) -> dict[str, Any]:
    """The vision configuration that mm_vision_tower stands for: a directory's in the checkpoint, or a built-in one."""
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{directory / 'config.json'} names no vision tower (mm_vision_tower)")
    local = directory / name / "config.json"
    if local.is_file():
        config = read_json(local)
        if config.get("model_type") == "siglip":  # text and vision together
            config = _nested(local, {"vision_config": {}} | config, "vision_config", "siglip_vision_model")
        if config.get("model_type", "siglip_vision_model") != "siglip_vision_model":
            raise CheckpointError(f"{local} describes a {config['model_type']}; only SigLIP towers can be loaded")
        return SO400M | config
    built_in = BUILT_IN_TOWERS.get(PurePosixPath(name).name)
    if built_in is None:
        raise CheckpointError(
            f"the vision tower {name!r} of {directory} is neither a directory in it that holds a config.json nor one "
            f"that is known: {', '.join(BUILT_IN_TOWERS)}"
        )
    return dict(built_in)


def _transformers(directory: Path, config: Mapping[str, Any]) -> CheckpointConfig:
    """transformers: nested text_config and vision_config; video is pooled bilinearly and ends with one newline.

    vision_feature_layer counts SiglipVisionModel's hidden states: 0 is the embedding, i the output of layer i - 1, and
    the last is *not* put through the post-layernorm. Published files have 26 layers and -1. Source:
    modeling_llava_onevision.py.
    """
    where = directory / "config.json"
    vision = _nested(where, config, "vision_config", "siglip_vision_model")
    text = _nested(where, config, "text_config", "qwen2")
    _require(where, config, "vision_feature_select_strategy", ("full",), default="full")
    _require(where, config, "projector_hidden_act", ("gelu",), default="gelu")
    _require(where, config, "multimodal_projector_bias", (True,), default=True)
    vision = SIGLIP_DEFAULTS | vision
    stored = _integer(where, vision, "num_hidden_layers")
    layer = config.get("vision_feature_layer", -1)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not -stored <= layer <= stored or layer == 0:
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer!r}, it must be the one layer to take the feature from: "
            f"1..{stored} or -{stored}..-1 with {stored} layers"
        )
    used = layer if layer > 0 else stored + 1 + layer
    return CheckpointConfig(
        format="transformers",
        geometry=_geometry(where, vision, layers=used, projector_size=_integer(where, text, "hidden_size")),
        stored_layers=stored,
        pooling="bilinear",
        newline="one_token",
        has_newline=True,
        text=_text(where, text, tied=bool(config.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings"))),
        eos_token_ids=_eos(directory, text, config),
        source={"config": dict(config)},
    )


def _nested(where: Path, config: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    nested = config.get(name)
    if not isinstance(nested, dict):
        raise CheckpointError(f"{where} has no {name}")
    if nested.get("model_type", kind) != kind:
        raise CheckpointError(f"{where}: {name} describes a {nested['model_type']}, it must be a {kind}")
    return nested


def _geometry(where: Path, vision: Mapping[str, Any], *, layers: int, projector_size: int) -> VisionGeometry:
    _require(where, vision, "hidden_act", ("gelu_pytorch_tanh",))
    _require(where, vision, "num_channels", (3,))
    return VisionGeometry(
        image_size=_integer(where, vision, "image_size"),
        patch_size=_integer(where, vision, "patch_size"),
        hidden_size=_integer(where, vision, "hidden_size"),
        heads=_integer(where, vision, "num_attention_heads"),
        intermediate_size=_integer(where, vision, "intermediate_size"),
        layers=layers,
        layer_norm_eps=_number(where, vision, "layer_norm_eps"),
        projector_size=projector_size,
    )


def _text(where: Path, config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Keyword arguments for Qwen2Config, the rotary embedding in transformers 5's form whichever way it is written."""
    for name in (*QWEN2_NEEDED, *(name for name in QWEN2_SIZES if config.get(name) is not None)):
        _integer(where, config, name)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: the rotary embedding is given as {rope!r}, it must be an object")
    rope = dict(rope)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)  # Qwen2's default; published files say 1e6
    _number(where, rope, "rope_theta")
    _number(where, {"rms_norm_eps": 1e-6} | dict(config), "rms_norm_eps")
    text = {name: config[name] for name in QWEN2_FIELDS if config.get(name) is not None}
    return text | {"rope_parameters": rope, "tie_word_embeddings": bool(tied)}


def _eos(directory: Path, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json's, or else the configuration's; () when neither tells."""
    path = directory / "generation_config.json"
    for config in (read_json(path) if path.is_file() else {}, *configs):
        ids = config.get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                raise CheckpointError(f"{directory}: eos_token_id is {ids!r}, it must be a token id or a list of them")
            return tuple(ids)
    return ()


def _require(where: Path, config: Mapping[str, Any], name: str, allowed: tuple[Any, ...], **default: Any) -> Any:
    """The value of a setting. Raises CheckpointError when it is not one of those that are implemented."""
    value = config.get(name, default.get("default"))
    if not any(value is x or (type(value) is type(x) and value == x) for x in allowed):
        fitting = ", ".join(repr(x) for x in allowed if x is not None)
        raise CheckpointError(f"{where}: {name} is {value!r}, what is implemented is {fitting}")
    return value


def _integer(where: Path, config: Mapping[str, Any], name: str) -> int:
    value, most = config.get(name), MOST.get(name, 2**20)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise CheckpointError(f"{where}: {name} is {value!r}, it must be a whole number from 1 to {most}")
    return value


def _number(where: Path, config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{where}: {name} is {value!r}, it must be a number above 0")
    return float(value)
