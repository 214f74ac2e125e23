"""The built-in demo asked one question through every engine that this machine runs: is the first token the same."""

from __future__ import annotations

from typing import Any

import torch

from earlytom.errors import EngineError
from earlytom.presets import preset
from earlytom.tower import StaticTower
from earlytom.video.clips import synthetic_clip
from engines.bundle.manifest import MODEL, Manifest
from engines.bundle.writer import BundleWriter, update_bundle
from export.onnx.exporter import DEFAULT_OPSET, export_tower

from .journal import Skip
from .workshop import Workshop

QUESTION = "What happens in this video?"


def first_tokens(shop: Workshop) -> dict[str, Any]:
    """{"tokens": engine -> id of its first token, "equal", "not_run": engine -> why}; the demo is float32."""
    from earlytom.checkpoint import load
    from earlytom.pipeline import VideoPipeline
    from engines.opening import open_runner
    from engines.products import ENGINES, PRODUCTS
    from engines.tensorrt.build import BuildOptions, build_engine
    from engines.tensorrt.runner import probe as probe_run

    model = load("demo", device="cpu")
    assert model.vision is not None
    layers, llm_layers = model.identity.geometry.layers, model.identity.language_layers
    config = preset("videomme", 0.2, depth=layers, llm_layers=llm_layers)
    tower = StaticTower(model.vision, config).eval()
    shop.tick("export the demo")
    folder = shop.folder / "demo"
    with BundleWriter(folder) as writer:
        exported = export_tower(tower, writer.path / MODEL, opset=DEFAULT_OPSET, progress=shop.tick)
        manifest = Manifest.derive(
            config, model.identity.geometry, dtype="fp32", opset=DEFAULT_OPSET, attention=exported.attention,
            checkpoint=model.identity.to_dict(), tools={},
        )
        bundle = writer.commit(manifest)
    not_run: dict[str, str] = {}
    for product in PRODUCTS:
        try:
            probe_run(product)
            record = build_engine(
                bundle.path / MODEL, manifest, shop.folder, BuildOptions(product=product), progress=shop.tick
            )
        except EngineError as error:
            not_run[product] = str(error)
        else:
            bundle = update_bundle(bundle, add={record.file: shop.folder / record.file}, engines=[record])

    clip = torch.from_numpy(synthetic_clip(config.frames, model.identity.geometry.image_size))

    def ask(encoder: Any) -> int:
        pipeline = VideoPipeline(encoder, model, config)
        return pipeline.ask(pipeline.encode(clip), QUESTION, max_new_tokens=1).ids[0]

    tokens: dict[str, int] = {}
    for name in ENGINES:
        if name in not_run:
            continue
        try:
            with open_runner(bundle, name, vision=model.vision) as runner:
                tokens[name] = ask(runner)
        except EngineError as error:
            not_run[name] = str(error)
    if len(tokens) < 2:
        raise Skip(f"fewer than two engines run here: {'; '.join(not_run.values())}")
    return {"tokens": tokens, "equal": len(set(tokens.values())) == 1, "not_run": not_run}
