"""The pipeline that lmms-eval's arguments ask for: a bundle's, or a checkpoint's own tower in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from earlytom.config import EarlyTomConfig, InnerMerging
from earlytom.errors import ConfigError
from earlytom.presets import preset

from .arguments import ModelArguments

if TYPE_CHECKING:
    from earlytom.checkpoint import CheckpointIdentity
    from earlytom.pipeline import VideoPipeline


def open_arguments(arguments: ModelArguments, device: str | None) -> VideoPipeline:
    """Open what `arguments` name, on `device` (None for the best there is); close the pipeline.

    Its configuration says how visual tokens are merged inside the LLM. Raises EarlyTomError.
    """
    from earlytom.checkpoint import load
    from earlytom.dtypes import torch_dtype
    from earlytom.pipeline import VideoPipeline

    from ..opening import default_dtype, open_pipeline, torch_device

    # Flash attention takes no mask that shows what comes later.
    attention = arguments.attention or ("sdpa" if arguments.inner == "as-released" else None)
    if arguments.bundle is not None:
        pipeline = open_pipeline(
            arguments.bundle, checkpoint=arguments.checkpoint, engine=arguments.engine or "auto", device=device,
            dtype=arguments.dtype, attention=attention, compile=arguments.compile, threads=arguments.threads,
            frame_budgets="data" if arguments.frame_budgets == "data" else "bundle",
        )
        pipeline.config = pipeline.config.replace(inner=inner_of(arguments, pipeline.config.inner))
        return pipeline
    where = torch_device(device)
    made: list[EarlyTomConfig] = []
    model = load(
        str(arguments.checkpoint), device=where, dtype=torch_dtype(arguments.dtype or default_dtype(where)),
        attn_implementation=attention, pooling=arguments.pooling,
        check=lambda identity: made.append(config_of(arguments, identity)),
    )
    (config,) = made
    return VideoPipeline(_tower(arguments, model.vision, config), model, config, compile=arguments.compile)


def config_of(arguments: ModelArguments, identity: CheckpointIdentity) -> EarlyTomConfig:
    """The published settings for a checkpoint, at its depth, or those of the unpruned model. Raises ConfigError."""
    changes: dict[str, Any] = {"pooling": identity.pooling, "newline": identity.newline}
    if arguments.frames is not None:
        changes["frames"] = arguments.frames
    if arguments.unpruned:
        changes |= {"merge_layers": (), "inner": None}
    config = preset(
        arguments.preset or "videomme", float(arguments.retain or 0),
        model="llava-video" if identity.newline == "grid" else "llava-onevision",
        depth=None if arguments.unpruned else identity.geometry.layers, llm_layers=identity.language_layers, **changes,
    )
    return config if arguments.unpruned else config.replace(inner=inner_of(arguments, config.inner))


def inner_of(arguments: ModelArguments, inner: InnerMerging | None) -> InnerMerging | None:
    """The merging inside the LLM: `inner` as it is, none, or as released. Raises ConfigError when there is none."""
    if arguments.inner == "off":
        return None
    if arguments.inner == "on":
        return inner
    if inner is None:
        raise ConfigError("there is no inner merging here to be as released: leave inner=as-released out")
    return replace(inner, as_released=True)


def _tower(arguments: ModelArguments, vision: Any, config: EarlyTomConfig) -> Any:
    from earlytom.adaptive import AdaptiveTower

    from ..pytorch import TorchRunner

    return TorchRunner(vision, config) if arguments.frame_budgets == "fixed" else AdaptiveTower(vision, config)
