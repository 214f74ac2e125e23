"""A language model's weights spread over cards, memory and disk, by accelerate: each goes straight to its place.

accelerate is imported here alone, and only when a model is spread.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, first_line
from .device_map import EMBEDDING, HEAD, Place, Placement, main_device, place_blocks, read_device_map
from .keys import Slot

if TYPE_CHECKING:
    from ..language.qwen2 import Qwen2

UNMOVED = ["past_key_values", "visual_spans", "prefilled"]  # arguments that accelerate leaves where they are


@dataclass(frozen=True)
class Spreading:
    """How to spread a language model: by a map of its modules, None for as it fits; folder: for what goes to disk."""

    places: Mapping[str, Place] | None
    folder: Path | None

    @staticmethod
    def of(device_map: str | Path | Mapping[str, Any], folder: str | Path | None) -> Spreading:
        """"auto", a JSON file or a map, see read_device_map. Raises ConfigError on what can be told without a model:
        accelerate is not there, nor a card that is named, nor a folder though something goes to disk."""
        if importlib.util.find_spec("accelerate") is None:
            raise ConfigError("a device map needs accelerate: pip install earlytom-export[device-map]")
        places = read_device_map(device_map)
        cards = [place for place in (places or {}).values() if isinstance(place, int)]
        if cards and max(cards) >= torch.cuda.device_count():
            raise ConfigError(
                f"the device map names card {max(cards)}, and PyTorch sees {torch.cuda.device_count()} CUDA devices"
            )
        disk = [name for name, place in (places or {}).items() if place == "disk"]
        if disk and folder is None:
            raise ConfigError(_no_folder(f"the device map puts {disk[0] or 'the model'} on disk"))
        return Spreading(places, None if folder is None else Path(folder).expanduser())

    @property
    def main(self) -> torch.device:
        """Where the model computes what lies in memory or on disk, and what the choice of dtype and attention is for:
        of "auto" the first card where there is one."""
        if self.places is None:
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return torch.device(main_device(self.places))

    def place(self, language: Qwen2, dtype: torch.dtype) -> Placement:
        """Where each block of a model without weights, to be loaded in `dtype`, goes. Raises ConfigError.

        By itself as transformers does it: evenly over the cards, 90 % of a single one, then 90 % of the free memory,
        then disk.
        """
        given = self.places
        if given is None:
            from accelerate.utils import get_balanced_memory, infer_auto_device_map

            language.tie_weights()  # or one matrix would count twice
            options: dict[str, Any] = {"dtype": dtype, "no_split_module_classes": ["Qwen2DecoderLayer"]}
            memory = get_balanced_memory(language, **options)
            free = memory.pop("mps", None) or memory.pop("cpu")  # a Mac's memory is named so
            memory["cpu"] = 0.9 * free  # last: what is placed by itself goes to cards first
            given = dict(infer_auto_device_map(language, max_memory=memory, **options))
        config = language.config
        placement = place_blocks(given, config.num_hidden_layers, tied=bool(config.tie_word_embeddings))
        on_disk = sum(place == "disk" for place in placement.places.values())
        if on_disk and self.folder is None:
            raise ConfigError(_no_folder(f"{on_disk} of {len(placement.places)} modules of the LLM fit on disk alone"))
        return placement


class Dispatcher:
    """The weights of one language model on their way to their places; what was written is removed on an error."""

    def __init__(self, placement: Placement, folder: Path | None, other: torch.device) -> None:
        """folder: gets a directory of its own for what lies on disk, which goes with the model or the process; other:
        where the weights of other parts go. Raises ConfigError when the folder cannot be written to."""
        self.placement, self.other = placement, other
        self.index: dict[str, dict[str, str]] = {}  # accelerate's: what is on disk, and where
        self.directory: Path | None = None
        if "disk" in placement.places.values():
            assert folder is not None  # Spreading has seen to it
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.directory = Path(tempfile.mkdtemp(prefix="earlytom-", dir=folder)).resolve()
            except OSError as error:
                raise ConfigError(f"the offload folder {folder} cannot be used: {error.strerror or error}") from None

    def check_room(self, needed: Mapping[Slot, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Raise ConfigError unless the disk has room for what goes there. needed: slot -> shape."""
        if self.directory is None:
            return
        shapes = [shape for slot, shape in needed.items() if self._on_disk(slot)]
        size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
        free = shutil.disk_usage(self.directory).free
        if size > free:
            raise ConfigError(
                f"{size / 1e9:.1f} GB of the language model are to lie in {self.directory.parent}, which has room for "
                f"{free / 1e9:.1f} GB"
            )

    def device(self, slot: Slot) -> torch.device:
        """Where a weight is read to; what goes to disk passes through memory."""
        if slot[0] != "language":
            return self.other
        place = self.placement.of(slot[1])
        return torch.device("cpu" if place == "disk" else place if isinstance(place, str) else f"cuda:{place}")

    def keep(self, slot: Slot, weight: Tensor) -> Tensor:
        """The weight, or if it belongs on disk a stand-in on the meta device for what was written there."""
        name = slot[1]
        if self.directory is None or not self._on_disk(slot):
            return weight
        file = self.directory / f"{name}.safetensors"
        try:
            save_file({name: weight}, file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.directory.parent} could not be written to: {first_line(error)}") from None
        self.index[name] = {
            "safetensors_file": str(file), "weight_name": name, "dtype": str(weight.dtype).removeprefix("torch."),
        }
        return torch.empty_like(weight, device="meta")

    def dispatch(self, language: Qwen2) -> None:
        """Have accelerate move inputs to their layers, and weights that are offloaded to where they are needed."""
        if not self.placement.is_spread:
            return
        from accelerate import dispatch_model

        if language.config.tie_word_embeddings and f"{EMBEDDING}.weight" in self.index:
            self.index[f"{HEAD}.weight"] = self.index[f"{EMBEDDING}.weight"]
        dispatch_model(
            language, dict(self.placement.places), main_device=_place_of(self.placement.main),
            offload_index=self.index or None, skip_keys=UNMOVED,
        )
        if self.directory is not None:
            weakref.finalize(language, shutil.rmtree, self.directory, ignore_errors=True)

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _on_disk(self, slot: Slot) -> bool:
        return slot[0] == "language" and self.placement.of(slot[1]) == "disk"


def keep_output_with_input(language: Qwen2) -> None:
    """What accelerate has at the top of a model that it spreads: what comes out is where the prompt was."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(language, AlignDevicesHook(language.device, io_same_device=True, skip_keys=UNMOVED))


def _place_of(device: str) -> Place:
    """A device as accelerate's maps name it."""
    return device if device == "cpu" else int(device.removeprefix("cuda:"))


def _no_folder(why: str) -> str:
    return f"{why}, and no offload folder was given: name a directory with --offload-folder (offload_folder=)"
