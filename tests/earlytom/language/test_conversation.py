"""Questions about one video: the answers are those of fresh prefills, and nothing waits for the device on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from earlytom.config import InnerMerging
from earlytom.errors import ConfigError, InputError
from earlytom.language.cache import PromptCache
from earlytom.language.conversation import Conversation, prefill
from earlytom.language.decode import CompiledDecoder
from earlytom.language.prompt import VIDEO_TOKEN, embed_prompt
from earlytom.language.qwen2 import Qwen2, generate
from tests.cases import five_only
from tests.earlytom.language import test_qwen2
from tests.earlytom.language.test_qwen2 import ARCHIVE, AS_RELEASED, CASES, INNER, METHODS, PROMPT, build, tiny, video

pytestmark = [pytest.mark.usefixtures("one_thread"), five_only]

MERGING = [None, *METHODS]
QUESTIONS = [PROMPT[4:], [30], [*range(50, 70)]]
BEFORE = PROMPT[:4]


def released(case: int) -> InnerMerging | None:
    meta = CASES[case]
    return None if meta["inner_layer"] is None else InnerMerging(meta["inner_layer"], meta["inner_ratio"])


def fresh(model: Qwen2, prompt: list[int], tokens: Tensor, inner: InnerMerging | None) -> Tensor:
    """Logits [vocabulary] after the prompt, by a prefill of all of it into a plain cache."""
    embeds, span = embed_prompt(model, prompt, tokens)
    with torch.no_grad():
        output = model(inputs_embeds=embeds, inner=inner, visual_spans=[span], past_key_values=DynamicCache())
    return output.logits[0, -1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_second_question_has_the_released_answer(case: int) -> None:
    """The golden prompts, asked after another question about the same video."""
    prompt, tokens, inner = CASES[case]["prompt"], torch.from_numpy(ARCHIVE[f"{case}_visual"]), released(case)
    conversation = Conversation(tiny())
    at = prompt.index(VIDEO_TOKEN) + 1
    conversation.answer([*prompt[:at], 9, 8, 7], tokens, inner=inner, max_new_tokens=3)
    for _ in range(2):
        ids = conversation.answer(prompt, tokens, inner=inner, max_new_tokens=8)
        assert ids.tolist() == ARCHIVE[f"{case}_generated"].tolist()


@pytest.mark.parametrize("method", [None, "attention", "dpc-knn"])
@settings(max_examples=6)
@given(data=st.data())
def test_logits_are_those_of_a_fresh_prefill(data: st.DataObject, method: str | None) -> None:
    """Whatever was asked before, how long it was, and however it was answered."""
    ratio = data.draw(st.sampled_from([0.5, 0.9, 0.3, 0.0]))
    inner = None if method is None else InnerMerging(data.draw(st.integers(1, 5)), ratio, method)
    before = [*data.draw(st.lists(st.integers(0, 511), max_size=3)), VIDEO_TOKEN]
    tokens = video(data.draw(st.sampled_from([25, 1, 2, 40])), data.draw(st.integers(0, 9)))
    questions = data.draw(st.lists(st.lists(st.integers(0, 511), min_size=1, max_size=9), min_size=2, max_size=3))
    cache = PromptCache(config=tiny().config)
    for question in questions:
        embeds, span = embed_prompt(tiny(), [*before, *question], tokens)
        logits = prefill(tiny(), embeds, span, inner, cache).logits[0, -1]
        assert relative(logits, fresh(tiny(), [*before, *question], tokens, inner)) < 1e-5
        for token in data.draw(st.lists(st.integers(0, 511), max_size=2)):  # of an answer
            with torch.no_grad():
                tiny()(input_ids=torch.tensor([[token]]), past_key_values=cache, inner=inner, visual_spans=[span])
        cache.rewind(sum(span))
        assert cache.get_seq_length() == sum(span)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("inner", MERGING)
def test_ids_are_those_of_generate_whatever_was_asked_before(implementation: str, inner: InnerMerging | None) -> None:
    model, tokens = tiny(implementation), video(25)
    conversation = Conversation(model)
    for question in QUESTIONS + QUESTIONS[:1]:
        ids = conversation.answer([*BEFORE, *question], tokens, inner=inner, max_new_tokens=6)
        assert ids.tolist() == generate(model, [*BEFORE, *question], tokens, inner=inner, max_new_tokens=6).tolist()


class Lengths:
    """How many tokens each of the model's layers is given, call by call."""

    def __init__(self, model: Qwen2) -> None:
        self.calls: list[list[int]] = []
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda _, given, index=index: self.add(index, given[0].shape[1]))

    def add(self, index: int, tokens: int) -> None:
        if index == 0:
            self.calls.append([])
        self.calls[-1].append(tokens)


@pytest.mark.parametrize("inner", MERGING)
def test_the_video_goes_through_the_shared_layers_once(inner: InnerMerging | None) -> None:
    model, tokens = build(), video(25)
    conversation, lengths = Conversation(model), Lengths(model)
    k, removed = (inner.layer, inner.removed(25)) if inner else (6, 0)

    def ask(question: list[int], **options: Any) -> list[int]:
        lengths.calls.clear()
        options = {"inner": inner, "max_new_tokens": 2} | options
        conversation.answer([*options.pop("before", BEFORE), *question], options.pop("video", tokens), **options)
        assert len(lengths.calls) in (1, 2) and lengths.calls[1:] in ([], [[1] * 6])
        return lengths.calls[0]

    whole = [28 + 4] * k + [28 + 4 - removed] * (6 - k)
    looks = inner is not None and inner.method == "attention"  # at the question
    again = [4] * k + [28 + 4 - removed if looks else 4] * (6 - k)
    assert ask([1, 2, 3, 4]) == whole
    assert ask([5, 6, 7, 8]) == again and ask([1, 2, 3, 4]) == again
    assert ask([1, 2, 3, 4], video=tokens.clone()) == whole, "another video, whatever its values"
    assert ask([1, 2, 3, 4]) == whole, "the last video alone is remembered"
    assert ask([1, 2, 3, 4], before=[9, 9, 9, VIDEO_TOKEN]) == whole, "other words before the video"
    assert ask([1, 2, 3, 4], inner=InnerMerging(5, 0.2)) == [32] * 5 + [27], "another merging"
    assert ask([1, 2, 3, 4]) == whole
    assert ask([1, 2, 3, 4], reuse=False) == whole and ask([1, 2, 3, 4]) == again, "and what was there is kept"
    conversation.forget()
    assert ask([1, 2, 3, 4]) == whole
    model.generation_config.cache_implementation = "dynamic"
    assert ask([1, 2, 3, 4]) == whole


def test_as_released_nothing_is_reused() -> None:
    model, tokens = tiny(), video(25)
    talk = Conversation(model)
    for question in QUESTIONS:
        prompt = [*BEFORE, *question]
        ids = talk.answer(prompt, tokens, inner=AS_RELEASED, max_new_tokens=5)
        assert ids.tolist() == generate(model, prompt, tokens, inner=AS_RELEASED, max_new_tokens=5).tolist()
        assert talk._last is None


def test_what_is_kept_is_what_the_next_question_needs() -> None:
    conversation, tokens = Conversation(tiny()), video(25)
    for inner in MERGING:
        conversation.answer([*BEFORE, 1, 2, 3], tokens, inner=inner, max_new_tokens=4)
        assert conversation._last is not None
        cache, k = conversation._last.cache, inner.layer if inner else 6
        looks = inner is not None and inner.method == "attention"
        above = 0 if looks else 28 - (inner.removed(25) if inner else 0)
        assert [cache.get_seq_length(layer) for layer in range(6)] == [28] * k + [above] * (6 - k)
        assert (cache.entering is not None) == looks
        if cache.entering is not None:
            assert cache.entering[0].shape == (1, 28, 64)


def test_an_answer_that_was_interrupted_leaves_nothing_half_done() -> None:
    class Stop(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.numel():
                raise KeyboardInterrupt

        def end(self) -> None: ...

    conversation, tokens = Conversation(tiny()), video(25)
    for question in QUESTIONS:
        expected = generate(tiny(), [*BEFORE, *question], tokens, inner=INNER, max_new_tokens=4).tolist()
        with pytest.raises(KeyboardInterrupt):
            conversation.answer([*BEFORE, *question], tokens, inner=INNER, max_new_tokens=4, streamer=Stop())
        assert conversation.answer([*BEFORE, *question], tokens, inner=INNER, max_new_tokens=4).tolist() == expected


def test_sampling_and_beams_are_those_of_generate() -> None:
    conversation, tokens = Conversation(tiny()), video(25)
    for options in ({"do_sample": True, "temperature": 3.0, "top_k": 0}, {"num_beams": 3}, {"num_return_sequences": 2,
                    "do_sample": True}, {"repetition_penalty": 1.5}, {"cache_implementation": "dynamic"}):
        for question in QUESTIONS[:2]:
            arguments: dict[str, Any] = {"inner": INNER, "max_new_tokens": 5, **options}
            torch.manual_seed(1)
            expected = generate(tiny(), [*BEFORE, *question], tokens, **arguments)
            torch.manual_seed(1)
            assert torch.equal(conversation.answer([*BEFORE, *question], tokens, **arguments), expected), options


def test_an_answer_is_streamed() -> None:
    class Keep(BaseStreamer):
        ids: tuple[int, ...] = ()
        ended = 0

        def put(self, value: Tensor) -> None:
            self.ids += tuple(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    for decoder in (None, CompiledDecoder(tiny(), lambda step: step)):
        conversation = Conversation(tiny(), decoder)
        for question in QUESTIONS[:2]:
            keep = Keep()
            ids = conversation.answer([*BEFORE, *question], video(25), max_new_tokens=4, streamer=keep)
            assert list(keep.ids) == ids.tolist() and keep.ended == 1


def test_models_with_windows_are_answered_without_it() -> None:
    model, tokens = build(use_sliding_window=True, sliding_window=8, max_window_layers=3), video(20)
    conversation = Conversation(model)
    for question in QUESTIONS[:2]:
        expected = generate(model, [*BEFORE, *question], tokens, max_new_tokens=3)
        assert torch.equal(conversation.answer([*BEFORE, *question], tokens, max_new_tokens=3), expected)
    assert conversation._last is None


def test_refused_caches() -> None:
    model, cache = tiny(), PromptCache(config=tiny().config)
    embeds, span = embed_prompt(model, PROMPT, video(25))
    with pytest.raises(InputError, match="it cannot go back to 1"):
        cache.rewind(1)
    prefill(model, embeds, span, INNER, cache)
    cache.rewind(28)
    foreign = DynamicCache(config=model.config)
    for index in range(INNER.layer):
        foreign.update(cache.layers[index].keys, cache.layers[index].values, index)
    with torch.no_grad(), pytest.raises(InputError, match="only a PromptCache that was rewound"):
        model(inputs_embeds=embeds[:, 28:], inner=INNER, visual_spans=[span], past_key_values=foreign)


class Copies(TorchDispatchMode):
    """Counts what goes from the host to the device `meta`."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        self.found += isinstance(out, Tensor) and out.is_meta and any(not x.is_meta and x.ndim for x in tensors)
        return out


@pytest.mark.parametrize("inner", MERGING)
def test_flash_attention(inner: InnerMerging | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of transformers' flash-attention path but the kernel itself."""
    monkeypatch.setattr(flash, "lazy_import_flash_attention", test_qwen2.fake_flash_attention([]))
    model, tokens = build(), video(25)
    model.config._attn_implementation = "flash_attention_2"
    conversation = Conversation(model)
    for question in QUESTIONS[:2]:
        ids = conversation.answer([*BEFORE, *question], tokens, inner=inner, max_new_tokens=4)
        assert ids.tolist() == generate(tiny(), [*BEFORE, *question], tokens, inner=inner, max_new_tokens=4).tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("inner", MERGING)
def test_the_host_waits_for_nothing_from_the_last_frame_to_the_first_logits(
    inner: InnerMerging | None, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device `meta`, whose tensors have no values, whatever reads one fails: item, tolist, bool, nonzero, a
    copy to the host. And one copy goes there, that of the prompt's ids, which does not wait on a card either.
    """
    def kernel(q: Tensor, *others: Any, causal: bool = False, softmax_scale: float = 1.0, **lengths: Any) -> Tensor:
        return q

    functions = ((kernel, kernel, None, None, None), (flash._lazy_define_process_function(kernel), None))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: functions)
    model, tokens = build().to("meta", torch.bfloat16), video(25).to("meta", torch.bfloat16)
    model.config._attn_implementation = implementation
    cache = PromptCache(config=model.config)
    for question in QUESTIONS:
        with Copies() as copies:
            embeds, span = embed_prompt(model, [*BEFORE, *question], tokens)
            logits = prefill(model, embeds, span, inner, cache).logits
        assert logits.is_meta and logits.shape == (1, 1, 512) and copies.found == 1
        cache.rewind(sum(span))


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, bool, int, Tensor.nonzero, Tensor.cpu])
def test_a_tensor_without_values_cannot_be_read(read: Callable[[Tensor], Any]) -> None:
    """What the test before this one stands on."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))


def test_a_mask_would_have_to_be_read() -> None:
    model = build().to("meta")
    embeds, span = embed_prompt(model, PROMPT, video(25).to("meta"))
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        model(inputs_embeds=embeds, attention_mask=torch.ones(1, 32, device="meta"), inner=INNER, visual_spans=[span])


COMPILERS: list[Any] = [
    pytest.param(lambda step: step, id="static"),
    pytest.param(lambda step: torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False), id="aot_eager",
                 marks=pytest.mark.slow),
    pytest.param(None, id="inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_decoding_gives_the_same_ids(compiler: Any) -> None:
    tokens = video(25)
    for inner in MERGING:
        conversation = Conversation(tiny(), CompiledDecoder(tiny(), compiler))
        for question, new in zip(QUESTIONS + QUESTIONS[:1], (6, 9, 6, 1)):
            ids = conversation.answer([*BEFORE, *question], tokens, inner=inner, max_new_tokens=new)
            expected = generate(tiny(), [*BEFORE, *question], tokens, inner=inner, max_new_tokens=new)
            assert ids.tolist() == expected.tolist()
    torch._dynamo.reset()


def test_static_layers_grow_when_they_must_and_end_where_an_answer_does() -> None:
    model = build()
    decoder = CompiledDecoder(model, lambda step: step)
    conversation, tokens = Conversation(model, decoder), video(25)
    ids = conversation.answer(PROMPT, tokens, inner=INNER, max_new_tokens=8).tolist()
    assert decoder.cache is not None
    assert [layer.max_cache_len for layer in decoder.cache.layers] == [128] * 6, "32 or 19, and 8, fit 128"
    kept = decoder.cache
    model.generation_config.eos_token_id = ids[3]
    stopped = conversation.answer(PROMPT, tokens, inner=INNER, max_new_tokens=8).tolist()
    assert stopped == ids[: ids.index(ids[3]) + 1] and decoder.cache is kept
    model.generation_config.eos_token_id = None
    expected = generate(model, PROMPT, tokens, inner=INNER, max_new_tokens=100).tolist()
    assert conversation.answer(PROMPT, tokens, inner=INNER, max_new_tokens=100).tolist() == expected
    assert [layer.max_cache_len for layer in decoder.cache.layers] == [256] * 3 + [128] * 3


def test_compiled_decoding_needs_attention_of_fixed_shape() -> None:
    model = build()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="needs attention sdpa or eager, not flash_attention_2"):
        CompiledDecoder(model)
