"""From what the user typed to one checked configuration."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from earlytom.checkpoint import CheckpointIdentity
from earlytom.config import EarlyTomConfig, InnerMerging, published_inner
from earlytom.errors import ConfigError
from earlytom.presets import environment_settings, preset

GIVEN = ("retain", "frames", "merge_layers", "frame_budgets", "tau", "max_window", "ema", "contextual")


def numbers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers separated by commas; an empty text is none."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 20,12,8") from None


def resolve(
    arguments: argparse.Namespace, identity: CheckpointIdentity, environ: Mapping[str, str] = os.environ
) -> EarlyTomConfig:
    """The configuration for this checkpoint: preset, then environment variables if asked for, then what was typed.

    Pooling, newlines and the scale of the published layer numbers come from the checkpoint. Raises ConfigError.
    """
    settings = environment_settings(environ) if arguments.from_environment else {}
    settings |= {name: getattr(arguments, name) for name in GIVEN if getattr(arguments, name) is not None}
    inner = _inner(arguments, identity, settings.pop("inner", None))
    return preset(
        arguments.preset,
        settings.pop("retain", 0.2),
        model="llava-video" if identity.newline == "grid" else "llava-onevision",
        depth=identity.geometry.layers,
        **(settings | {"pooling": identity.pooling, "newline": identity.newline, "inner": inner}),
    )


def _inner(
    arguments: argparse.Namespace, identity: CheckpointIdentity, from_environment: InnerMerging | None
) -> InnerMerging | None:
    """What to merge inside the LLM: typed, or from the environment, or as published for an LLM of this depth."""
    layers = identity.language_layers
    published = from_environment or published_inner(layers)
    if arguments.inner_layer == 0 or (published is None and arguments.inner_layer is None):
        return None
    published = published or InnerMerging(arguments.inner_layer)
    layer = published.layer if arguments.inner_layer is None else arguments.inner_layer
    ratio = published.ratio if arguments.inner_ratio is None else arguments.inner_ratio
    if layer >= layers:
        raise ConfigError(
            f"inner layer {layer} does not exist: the LLM has {layers} layers, so it must lie in 1..{layers - 1}, "
            "or be 0 for no inner merging"
        )
    return InnerMerging(layer=layer, ratio=ratio, method=arguments.inner_method)
