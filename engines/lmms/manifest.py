"""What lmms-eval's registry is told of us: the entry point `earlytom` of the group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's ModelManifest: the model `earlytom` in both of its forms. Nothing else of ours is imported yet."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = f"{__package__}.model"
    return ModelManifest("earlytom", simple_class_path=f"{home}.EarlyTom", chat_class_path=f"{home}.EarlyTomChat")
