"""Layers on several cards, and blocks that bring their weights as a whole. The cards are fake, and so are values on
them, but PyTorch refuses operations on tensors of two of them as it does with real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from earlytom.checkpoint.device_map import Placement, place_blocks
from earlytom.checkpoint.dispatch import UNMOVED
from earlytom.config import InnerMerging
from earlytom.language.cache import PromptCache
from earlytom.language.conversation import prefill
from earlytom.language.devices import execution_device, weights_at_hand
from earlytom.language.qwen2 import Qwen2
from tests.cases import five_only
from tests.earlytom.language.test_qwen2 import INNER, PROMPT, answer, build, tiny, video

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_CARDS = place_blocks({"model": 0, "lm_head": 1, "model.layers.2": 1, "model.layers.4": 1}, 6, tied=False)


class StrictIndexing(TorchDispatchMode):
    """Refuses indices on another card than the tensor, which fake tensors let pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            for index in args[1]:
                if index is not None and index.device not in (args[0].device, torch.device("cpu")):
                    raise RuntimeError(f"an index on {index.device} of a tensor on {args[0].device}: two devices")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny()  # is kept: its values must be real
    monkeypatch.setattr(AlignDevicesHook, "init_hook", lambda self, module: module)  # weights are there: on_cards
    with FakeTensorMode(), StrictIndexing():
        yield


def on_cards(placement: Placement) -> Qwen2:
    """The model with its weights where the placement says, and accelerate's hooks for that."""
    model = Qwen2(tiny().config).eval()
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, device=f"cuda:{placement.of(f'{path}.{name}')}")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cuda:0")
    return dispatch_model(model, dict(placement.places), main_device=0, skip_keys=UNMOVED)


def test_the_fake_cards_refuse_what_real_ones_do(fake_cards: None) -> None:
    with pytest.raises(RuntimeError, match="two devices"):
        torch.empty(2, device="cuda:0") + torch.empty(2, device="cuda:1")
    with pytest.raises(RuntimeError, match="two devices"):
        torch.empty(2, device="cuda:0")[torch.empty(2, dtype=torch.int64, device="cuda:1")]


@five_only
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("method", [None, "attention", "dpc-knn", "as released"])
def test_layers_on_two_cards(fake_cards: None, method: str | None, k: int) -> None:
    """Layer k - 1 on card 0 and k on card 1, or the other way round: a prompt, its answer, and another question."""
    settings = {"as_released": True} if method == "as released" else {"method": method}
    inner = None if method is None else InnerMerging(k, 0.5, **settings)
    model = on_cards(TWO_CARDS)
    assert model.device == torch.device("cuda:0")
    cache, span = PromptCache(config=model.config), (3, 25)
    for question in (4, 6) if method != "as released" else (4,):
        embeds = torch.empty(1, sum(span) + question, 64, device="cuda:0")
        out = prefill(model, embeds, span, inner, cache)
        assert out.logits.device == torch.device("cuda:0"), "where the prompt was"
        for _ in range(2):
            token = torch.zeros(1, 1, dtype=torch.int64, device="cuda:0")
            model(input_ids=token, past_key_values=cache, inner=inner, visual_spans=[span])
        assert [str(layer.keys.device) for layer in cache.layers] == [f"cuda:{int(i in (2, 4))}" for i in range(6)]
        cache.rewind(sum(span))


@pytest.mark.parametrize("whole", ["Qwen2DecoderLayer", "Qwen2Attention"])
def test_blocks_that_bring_their_weights_as_a_whole(whole: str, tmp_path: Path) -> None:
    """Their parts have no hooks: outside of the block's own call their weights are on the meta device."""
    places = dict(place_blocks({"": "cpu", "model.layers": "disk"}, 6, tied=False).places)
    model = dispatch_model(build(), places, offload_dir=tmp_path, skip_keys=UNMOVED, preload_module_classes=[whole])
    attention = model.model.layers[INNER.layer - 1].self_attn
    assert attention.q_proj.weight.is_meta and not hasattr(attention.q_proj, "_hf_hook")
    ids, logits = answer(model, PROMPT, video(25), inner=INNER)
    expected_ids, expected = answer(tiny(), PROMPT, video(25), inner=INNER)
    assert ids.tolist() == expected_ids.tolist() and (logits - expected).norm() < 1e-6 * expected.norm()
    assert attention.q_proj.weight.is_meta, "and they are there again"


def test_weights_are_at_hand_under_a_hook_or_several_and_let_go_of_after_an_error() -> None:
    def offload(module: nn.Module) -> Any:
        return AlignDevicesHook("cpu", offload=True, place_submodules=True)

    for hooks in ([], [offload], [offload, lambda _: AlignDevicesHook("cpu")]):
        module = nn.Sequential(nn.Linear(2, 2))
        expected = module[0].weight.detach().clone()
        if hooks:
            made = [hook(module) for hook in hooks]
            add_hook_to_module(module, SequentialHook(*made) if made[1:] else made[0])
        assert module[0].weight.is_meta == bool(hooks)
        with pytest.raises(KeyError), weights_at_hand(module):
            assert torch.equal(module[0].weight, expected) and execution_device(module) == torch.device("cpu")
            raise KeyError
        assert module[0].weight.is_meta == bool(hooks)
