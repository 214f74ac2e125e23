"""From settings to results: weights, clip and bundle are made ready, and the contest is held."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlytom import __version__
from earlytom.checkpoint import Model, load
from earlytom.checkpoint.random_model import random_model
from earlytom.config import EarlyTomConfig
from earlytom.dtypes import DTYPES, torch_dtype
from earlytom.errors import ConfigError, EngineError
from earlytom.language.prompt import build_prompt
from earlytom.presets import preset
from earlytom.video import read_frames, verification_clips

from ..bundle.reader import Bundle, read_bundle
from ..opening import default_dtype, torch_device
from .contest import hold_contest
from .contestants import Subject
from .machine import clocks, commit, describe_machine
from .results import Results
from .settings import Settings


def bench(settings: Settings, *, tell: Callable[[str], None] = lambda _: None) -> Results:
    """Measure. tell: is told how it goes, line by line.

    Raises BundleError, CheckpointError, ConfigError, EngineError (nobody could take part), VideoError.
    """
    bundle = read_bundle(settings.bundle) if settings.bundle else None
    device = torch_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Machine and clocks are those of the current card.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        model = _model(settings, bundle, device)
        subject = _subject(settings, bundle, device, model)
        frames, read = _frames(settings, subject, tell)
        before = clocks()
        rows, not_run = hold_contest(subject, settings, frames, read=read, tell=tell)
        vision, language = subject.vision, subject.language
        settings = replace(settings, frames=subject.config.frames, retain=subject.config.retain)  # a bundle's, if any
        return Results(
            settings, _describe(subject, model, bundle), rows, not_run, device=str(device),
            dtype=_name(vision.dtype) if vision is not None else str(bundle and bundle.manifest.dtype),
            language_dtype=_name(language.dtype) if language is not None else "",
            attention=str(language.config._attn_implementation) if language is not None else "",
            machine=describe_machine() | {"threads": torch.get_num_threads()},
            clocks={"before": before, "after": clocks()}, version=__version__, commit=commit(),
        )


def _name(dtype: torch.dtype) -> str:
    """As the command line has it."""
    return next(name for name, known in DTYPES.items() if known.torch == str(dtype).removeprefix("torch."))


def _model(settings: Settings, bundle: Bundle | None, device: torch.device) -> Model | None:
    """The weights that are needed; None where engines alone are measured and no weights were named."""
    parts = ("vision",) if settings.vision_only else ("vision", "language")
    language = settings.dtype or default_dtype(device)
    vision = settings.dtype or (bundle.manifest.dtype if bundle else language)
    if settings.full_size:
        return random_model(
            settings.full_size, dtype=torch_dtype(vision), language_dtype=torch_dtype(language), device=device,
            parts=parts,
        )
    name = settings.checkpoint or ("demo" if bundle is None else str(bundle.manifest.checkpoint["name"]))
    if bundle is not None and settings.vision_only and settings.checkpoint is None:
        return None
    reading: dict[str, Any] = {"device": device}
    if bundle is not None:
        reading |= {"pooling": bundle.manifest.config.pooling, "check": bundle.check_weights}
    if vision == language or settings.vision_only:
        return load(name, parts=parts, dtype=torch_dtype(vision), **reading)
    tower = load(name, parts=("vision",), dtype=torch_dtype(vision), **reading)
    model = load(name, parts=("language",), dtype=torch_dtype(language), **reading)
    return Model(tower.vision, model.language, model.tokenizer, model.identity, model.eos_token_ids)


def _subject(settings: Settings, bundle: Bundle | None, device: torch.device, model: Model | None) -> Subject:
    vision, language = (model.vision, model.language) if model is not None else (None, None)
    if bundle is not None:
        config, geometry, batch = bundle.manifest.config, bundle.manifest.geometry, bundle.manifest.batch
        if model is not None and model.geometry != geometry:
            raise ConfigError(
                f"the bundle {bundle.path} and {model.identity.name} differ in size: {geometry} against "
                f"{model.geometry}"
            )
        if batch != 1 and not settings.vision_only:
            raise ConfigError(f"the bundle {bundle.path} takes {batch} videos a call: --vision-only measures it")
    else:
        assert model is not None
        geometry, batch = model.geometry, 1
        config = preset_config(settings, model)
    prompt: tuple[int, ...] = ()
    if language is not None:
        if model is None or model.tokenizer is None:
            raise EngineError("no tokenizer is in the checkpoint, so a question cannot be put to it: --vision-only")
        prompt = tuple(build_prompt(model.tokenizer, settings.prompt))
    elif not settings.vision_only:
        raise EngineError("no language model was loaded")
    return Subject(
        config, geometry, device, vision, language, bundle, prompt, batch, engine_device=settings.device,
        threads=settings.threads,
    )


def preset_config(settings: Settings, model: Model) -> EarlyTomConfig:
    """The settings published for VideoMME, scaled to the model."""
    return preset(
        "videomme", settings.retain, depth=model.geometry.layers, llm_layers=model.identity.language_layers,
        frames=settings.frames, pooling=model.identity.pooling, newline=model.identity.newline,
    )


def _frames(
    settings: Settings, subject: Subject, tell: Callable[[str], None]
) -> tuple[Tensor, Callable[[], dict[str, float]] | None]:
    """Frames uint8 [V, T, H, W, 3], and what reads the video again and tells its times in ms; None without a video."""
    config, size, video = subject.config, subject.geometry.image_size, settings.video
    clips = verification_clips(
        Path(video) if video else None, frames=config.frames, size=size, batch=subject.batch, tell=tell
    )
    if not video:
        return torch.from_numpy(clips), None

    def read() -> dict[str, float]:
        found = read_frames(video, frames=config.frames, size=size)
        return {"decode": 1000 * found.decode_seconds, "resize": 1000 * found.resize_seconds}

    return torch.from_numpy(clips), read


def _describe(subject: Subject, model: Model | None, bundle: Bundle | None) -> str:
    """What was measured, in a line."""
    name = model.identity.name if model is not None else str(bundle and bundle.manifest.checkpoint["name"])
    config, geometry = subject.config, subject.geometry
    inner = f", inner merging before layer {config.inner.layer}" if config.inner and subject.language else ""
    return (
        f"{name}, {config.frames} frames of {geometry.image_size} x {geometry.image_size}, retain {config.retain:g}, "
        f"merge layers {','.join(map(str, config.merge_layers))}, "
        f"frame budgets {','.join(map(str, config.frame_budgets))}{inner}"
    )
