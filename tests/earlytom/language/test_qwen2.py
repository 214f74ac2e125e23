"""Qwen2 with inner merging: the released code's answers, a plain reference for decoding, batches, caches, refusals."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from earlytom.config import InnerMerging
from earlytom.errors import ConfigError, InputError
from earlytom.inner import merge_tokens, merge_tokens_dpc_knn
from earlytom.language import qwen2
from earlytom.language.cache import PromptCache
from earlytom.language.prompt import VIDEO_TOKEN, embed_prompt
from earlytom.language.qwen2 import Qwen2, generate
from earlytom.language.score import last_query_attention
from earlytom.language.versions import qwen2_config, run_layer
from tests.cases import five_only

GOLDEN = Path(__file__).parents[2] / "golden" / "e2e"
ARCHIVE = np.load(GOLDEN / "e2e.npz")
CASES = json.loads(str(ARCHIVE["meta"]))
PROMPT = [5, 6, 7, VIDEO_TOKEN, 11, 12, 13, 14]
INNER = InnerMerging(layer=3, ratio=0.5)
METHODS = [INNER, InnerMerging(layer=2, ratio=0.7, method="dpc-knn")]
AS_RELEASED = InnerMerging(layer=3, ratio=0.5, as_released=True)


def build(implementation: str = "sdpa", **changes: Any) -> Qwen2:
    """The golden checkpoint's language model, 6 layers of width 64."""
    values = json.loads((GOLDEN / "tiny-llava-onevision" / "config.json").read_text())
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
    settings = {name: values[name] for name in names}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": values["rope_theta"]}} | changes
    model = Qwen2(qwen2_config(settings | {"attn_implementation": implementation})).eval()
    with safe_open(GOLDEN / "tiny-llava-onevision" / "model.safetensors", "pt") as file:
        foreign = ("vision", "mm_projector", "image_newline")
        keys = [key for key in file.keys() if not any(name in key for name in foreign)]  # noqa: SIM118
        model.load_state_dict({key: file.get_tensor(key) for key in keys})
    return model

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def tiny(implementation: str = "sdpa") -> Qwen2:
    return build(implementation)


def video(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)) * 0.5


class Recorder(LogitsProcessor):
    """Keeps the logits [B, vocabulary] of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


def answer(model: Qwen2, prompts: Any, videos: Any, *, new: int = 6, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Generated ids, and logits [B, new, vocabulary]."""
    recorder = Recorder()
    ids = generate(
        model, prompts, videos, max_new_tokens=new, logits_processor=LogitsProcessorList([recorder]), **kwargs
    )
    return ids, torch.stack(recorder.steps, dim=1)


def by_hand(
    model: Qwen2, embeds: Tensor, spans: Any, inner: InnerMerging | None, steps: int
) -> tuple[list[int], Tensor, DynamicCache]:
    """Greedy decoding with forward alone: ids [steps], logits [steps + 1, vocabulary], and the cache."""
    past, ids, logits = DynamicCache(), [], []
    request = {"inner": inner, "visual_spans": spans, "past_key_values": past, "use_cache": True}
    with torch.no_grad():
        out = model(inputs_embeds=embeds, **request)
        logits.append(out.logits[0, -1])
        for _ in range(steps):
            ids.append(int(logits[-1].argmax()))
            logits.append(model(input_ids=torch.tensor([[ids[-1]]]), **request).logits[0, -1])
    return ids, torch.stack(logits), past


def cached(past: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer; before 4.54 transformers kept them in two lists."""
    if hasattr(past, "layers"):
        return past.layers[layer].keys, past.layers[layer].values
    return past.key_cache[layer], past.value_cache[layer]


@torch.no_grad()
def reference(model: Qwen2, embeds: Tensor, span: tuple[int, int], inner: InnerMerging, ids: list[int]) -> Tensor:
    """Logits after the prompt and after each of ids, without a cache: written from the design, on the eager model."""
    assert model.config._attn_implementation == "eager"
    body, prompt = model.model, embeds.shape[1]
    hidden = torch.cat([embeds, body.embed_tokens(torch.tensor([ids]))], dim=1) if ids else embeds
    positions = torch.arange(hidden.shape[1])[None]

    def run(index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[1]
        mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
        if inner.as_released and index == inner.layer - 1:
            mask[..., :prompt, :prompt] = 0  # a prompt's tokens see all of it
        layer, rotary = body.layers[index], body.rotary_emb(hidden, positions)
        _, weights = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)
        return run_layer(layer, hidden, None, attention_mask=mask, position_embeddings=rotary), weights

    for index in range(inner.layer):
        hidden, weights = run(index, hidden, positions)
    score = weights[0, :, prompt - 1, :prompt].mean(0)
    where: dict[str, Any] = {"start": span[0], "length": span[1], "ratio": inner.ratio}
    if inner.method == "attention":
        merged, kept = merge_tokens(hidden[:, :prompt], score, **where)
    else:
        merged, kept = merge_tokens_dpc_knn(hidden[:, :prompt], **where)
    hidden = torch.cat([merged, hidden[:, prompt:]], dim=1)
    positions = torch.cat([kept, positions[0, prompt:]])[None]
    for index in range(inner.layer, len(body.layers)):
        hidden, _ = run(index, hidden, positions)
    return model.lm_head(body.norm(hidden))[0, merged.shape[1] - 1 :]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_released_answers(case: int, implementation: str) -> None:
    meta, tokens = CASES[case], torch.from_numpy(ARCHIVE[f"{case}_visual"])
    inner = None if meta["inner_layer"] is None else InnerMerging(meta["inner_layer"], meta["inner_ratio"])
    ids, logits = answer(tiny(implementation), meta["prompt"], tokens, new=8, inner=inner)
    np.testing.assert_allclose(logits[0, 0], ARCHIVE[f"{case}_first_logits"], rtol=0, atol=1e-3)
    assert ids.tolist() == ARCHIVE[f"{case}_generated"].tolist()


def test_released_answers_need_the_merging() -> None:
    logits = answer(tiny(), CASES[3]["prompt"], torch.from_numpy(ARCHIVE["3_visual"]), new=1)[1]
    assert (logits[0, 0] - torch.from_numpy(ARCHIVE["3_first_logits"])).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("inner", [*METHODS, AS_RELEASED, InnerMerging(1, 0.8), InnerMerging(5, 0.25)])
def test_decoding_is_the_reference(implementation: str, inner: InnerMerging) -> None:
    embeds, span = embed_prompt(tiny(), PROMPT, video(25))
    ids, logits = answer(tiny(implementation), PROMPT, video(25), inner=inner)
    expected = reference(tiny("eager"), embeds, span, inner, ids.tolist()[:-1])
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    hand_ids, hand_logits, _ = by_hand(tiny(implementation), embeds, [span], inner, len(ids) - 1)
    assert hand_ids == ids.tolist()[:-1]
    torch.testing.assert_close(hand_logits, logits[0], rtol=1e-4, atol=1e-5)


def test_the_score_is_the_last_row_of_attention() -> None:
    model = tiny("eager").model
    hidden = torch.cat([video(20, 1), video(20, 2)]).view(2, 20, 64)
    visible = torch.arange(20) >= torch.tensor([[0], [7]])
    rotary = model.rotary_emb(hidden, torch.arange(20)[None])
    mask = torch.zeros(2, 1, 20, 20).masked_fill(~(visible[:, None, None] & torch.ones(20, 20).tril().bool()), -1e30)
    for layer in model.layers:
        with torch.no_grad():
            _, weights = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)
            score = last_query_attention(layer, hidden, rotary, visible)
        torch.testing.assert_close(score, weights[:, :, -1].mean(1))
        assert (score[1, :7] == 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [i for i, meta in enumerate(CASES) if meta["inner_layer"] is not None])
def test_released_answers_under_sdpa(case: int, implementation: str) -> None:
    """as_released.npz: what the released model class gives under SDPA, whose mask e2e.npz had put back, for the same
    prompts and visual tokens: 8 greedy tokens and their logits; transformers 4.51.3, torch 2.5.0."""
    meta, tokens = CASES[case], torch.from_numpy(ARCHIVE[f"{case}_visual"])
    inner = InnerMerging(meta["inner_layer"], meta["inner_ratio"], as_released=True)
    ids, logits = answer(tiny(implementation), meta["prompt"], tokens, new=8, inner=inner)
    with np.load(GOLDEN / "as_released.npz") as archive:
        np.testing.assert_allclose(logits[0], archive[f"{case}_logits"], rtol=0, atol=1e-3)
        assert ids.tolist() == archive[f"{case}_generated"].tolist()


def test_as_released_is_another_answer() -> None:
    causal, released = (answer(tiny(), PROMPT, video(25), inner=inner)[1] for inner in (INNER, AS_RELEASED))
    assert (causal[0, 0] - released[0, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_as_released_padding_is_seen_by_nobody(implementation: str) -> None:
    model, prompts, videos = tiny(implementation), [PROMPT, PROMPT[2:6]], [video(25), video(12, 1)]
    together = answer(model, prompts, videos, inner=AS_RELEASED)[1]
    for i in range(2):
        alone = answer(model, prompts[i], videos[i], inner=AS_RELEASED)[1]
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


@five_only
def test_as_released_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    embeds, span = embed_prompt(model, PROMPT, video(25))
    past = PromptCache(config=model.config)
    with torch.no_grad():
        model(inputs_embeds=embeds[:, :28], past_key_values=past, inner=INNER, visual_spans=[span])
        past.rewind(28)
        with pytest.raises(InputError, match="the whole prompt in one prefill"):
            model(inputs_embeds=embeds[:, 28:], past_key_values=past, inner=AS_RELEASED, visual_spans=[span])
        monkeypatch.setattr(qwen2, "causal_mask", lambda *_, **__: None)  # flex attention's takes seconds
        with pytest.raises(ConfigError, match="does not go with flex_attention attention"):
            build("flex_attention")(inputs_embeds=embeds, inner=InnerMerging(1, as_released=True), visual_spans=[span])


@pytest.mark.parametrize("inner", METHODS)
def test_cache_lengths(inner: InnerMerging) -> None:
    model, k = tiny(), inner.layer
    embeds, span = embed_prompt(model, PROMPT, video(25))
    removed = inner.removed(25)
    assert span == (3, 25) and removed in (13, 17)
    for steps in (0, 3):
        _, _, past = by_hand(model, embeds, [span], inner, steps)
        lengths = [past.get_seq_length(layer) for layer in range(6)]
        assert lengths == [32 + steps] * k + [32 - removed + steps] * (6 - k)
        assert [keys.shape[2] for keys, _ in map(partial(cached, past), range(6))] == lengths


def test_layers_below_stay_causal_and_whole() -> None:
    embeds, span = embed_prompt(tiny(), PROMPT, video(25))
    _, _, plain = by_hand(tiny(), embeds, None, None, 0)
    for inner in METHODS:
        _, _, merged = by_hand(tiny(), embeds, [span], inner, 0)
        for layer in range(6):
            seen = 32 if layer < inner.layer else span[0]  # from k on: the text before the video sees no video
            for one, other in zip(cached(plain, layer), cached(merged, layer), strict=True):
                torch.testing.assert_close(one[:, :, :seen], other[:, :, :seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("inner", [None, *METHODS])
def test_a_batch_is_each_sample_alone(implementation: str, inner: InnerMerging | None) -> None:
    model = tiny(implementation)
    prompts = [PROMPT, [VIDEO_TOKEN, 9], [8, *PROMPT, 21, 22], torch.tensor([3, VIDEO_TOKEN, 4])]
    videos = [video(30, 1), video(12, 2), video(21, 3), video(1, 4)]
    ids, logits = answer(model, prompts, videos, inner=inner)
    assert ids.shape == (4, 6)
    for sample, (prompt, tokens) in enumerate(zip(prompts, videos, strict=True)):
        alone_ids, alone_logits = answer(model, prompt, tokens, inner=inner)
        assert alone_ids.shape == (6,)
        torch.testing.assert_close(logits[sample], alone_logits[0], rtol=1e-4, atol=1e-4)
        assert ids[sample].tolist() == alone_ids.tolist()


def test_a_batch_without_padding_but_with_different_spans() -> None:
    prompts, videos = [PROMPT, [9, *PROMPT, 9, 9, 9, 9]], [video(25, 1), video(20, 2)]
    ids, logits = answer(tiny(), prompts, videos, inner=INNER)  # transformers drops a mask that is all ones
    for sample in range(2):
        alone_ids, alone_logits = answer(tiny(), prompts[sample], videos[sample], inner=INNER)
        torch.testing.assert_close(logits[sample], alone_logits[0], rtol=1e-4, atol=1e-4)
        assert ids[sample].tolist() == alone_ids.tolist()


@pytest.mark.parametrize("inner", METHODS)
def test_what_stands_in_the_padding_does_not_matter(inner: InnerMerging) -> None:
    model = build()
    embeds, (start, length) = embed_prompt(model, PROMPT, video(25))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20  # sharp attention, or padding is too little of it to show
        expected = model(inputs_embeds=embeds, inner=inner, visual_spans=[(start, length)]).logits[0]
        for seed in range(4):
            padded = torch.cat([video(50, seed)[None], embeds], dim=1)
            mask = (torch.arange(padded.shape[1]) >= 50).long()[None]
            places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate counts them
            request = {"inner": inner, "visual_spans": [(start + 50, length)]}
            logits = model(inputs_embeds=padded, attention_mask=mask, position_ids=places, **request).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_with_a_text_only_sample_is_as_short_as_it_can_be() -> None:
    model = tiny()
    embeds, span = embed_prompt(model, PROMPT, video(40))
    text = model.get_input_embeddings()(torch.tensor([[1, 2, 3, 4, 5]]))
    batch = torch.cat([embeds, torch.nn.functional.pad(text, (0, 0, 42, 0))])
    mask = (torch.arange(47) >= torch.tensor([[0], [42]])).long()
    arguments = {"inner": INNER, "visual_spans": [span, (0, 0)], "attention_mask": mask}
    with torch.no_grad():
        out = model(inputs_embeds=batch, **arguments)
        assert out.past_key_values.get_seq_length(INNER.layer) == 27
        torch.testing.assert_close(out.logits[1, -1], model(inputs_embeds=text).logits[0, -1], rtol=1e-4, atol=1e-4)
        one = model(inputs_embeds=embeds, inner=INNER, visual_spans=[span]).logits[0, -1]
        torch.testing.assert_close(out.logits[0, -1], one, rtol=1e-4, atol=1e-4)


def fake_flash_attention(calls: list[str]) -> Any:
    """flash-attn's interface on plain torch: q, k, v [B, S, H, d], causal to the lower right, padding taken out."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        logits = q @ k.transpose(2, 3) * softmax_scale
        if causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
            logits = logits.masked_fill(hidden, float("-inf"))
        return (logits.softmax(-1) @ v).transpose(1, 2)

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float = 1.0) -> Tensor:
        calls.append("dense")
        return attend(q, k, v, causal, softmax_scale)

    def ragged(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, causal: bool = False, softmax_scale: float = 1.0,
    ) -> Tensor:
        calls.append("ragged")
        cuts = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        parts = [attend(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)[0] for a, b, c, d in cuts]
        return torch.cat(parts)

    functions = (dense, ragged, None, flash._pad_input, flash._unpad_input)
    return lambda *_, **__: (functions, (flash._lazy_define_process_function(ragged), None))


@five_only
@pytest.mark.parametrize("inner", [None, *METHODS])
def test_flash_attention(inner: InnerMerging | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of transformers' flash-attention path but the kernel itself, which wants a GPU and flash-attn."""
    calls: list[str] = []
    monkeypatch.setattr(flash, "lazy_import_flash_attention", fake_flash_attention(calls))
    model = build()
    model.config._attn_implementation = "flash_attention_2"
    prompts, videos = [PROMPT, [VIDEO_TOKEN, 9]], [video(30, 1), video(12, 2)]
    ids, logits = answer(model, PROMPT, videos[0], inner=inner)
    assert calls == ["dense"] * 6 * 6  # nothing taken for packed sequences
    expected_ids, expected = answer(tiny(), PROMPT, videos[0], inner=inner)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    calls.clear()
    ids, logits = answer(model, prompts, videos, inner=inner)
    assert set(calls[:6]) == {"ragged"} or inner is not None
    expected_ids, expected = answer(tiny(), prompts, videos, inner=inner)
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def square_outputs(model: Qwen2, tokens: int) -> int:
    """How many tensors of at least tokens x tokens in their last two dimensions a prefill makes."""
    embeds, span = embed_prompt(model, PROMPT, video(tokens - 7))

    class Watch(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                self.found += isinstance(x, Tensor) and x.ndim > 1 and min(x.shape[-2:]) >= tokens
            return out

    with torch.no_grad(), Watch() as watch:
        model(inputs_embeds=embeds, inner=INNER, visual_spans=[span])
    return watch.found


def test_no_attention_matrix() -> None:
    assert square_outputs(tiny("sdpa"), 600) == 0
    assert square_outputs(tiny("eager"), 600) > 0


def test_sampling_and_beams() -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"inner": INNER, "max_new_tokens": 5}
    drawn = generate(
        tiny(), PROMPT, video(25), do_sample=True, temperature=3.0, top_k=0, num_return_sequences=3, **arguments
    )
    assert drawn.shape == (3, 5) and len({tuple(row.tolist()) for row in drawn}) == 3
    prompts, videos = [PROMPT, [VIDEO_TOKEN, 9]], [video(30, 1), video(12, 2)]
    beams = generate(tiny(), prompts, videos, num_beams=3, **arguments)
    for sample in range(2):
        alone = generate(tiny(), prompts[sample], videos[sample], num_beams=3, **arguments)
        assert beams[sample].tolist() == alone.tolist()


def test_streaming() -> None:
    class Keep(BaseStreamer):
        ids: tuple[int, ...] = ()

        def put(self, value: Tensor) -> None:
            self.ids += tuple(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    keep = Keep()
    ids = generate(tiny(), PROMPT, video(25), inner=INNER, max_new_tokens=6, streamer=keep)
    assert list(keep.ids) == ids.tolist() and keep.ended
    words: Any = SimpleNamespace(decode=lambda ids, **_: "".join(f"<{i}> " for i in ids))
    streamer = TextIteratorStreamer(words)
    generate(tiny(), PROMPT, video(25), inner=INNER, max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == words.decode(ids.tolist())


def test_nothing_is_left_behind() -> None:
    model = build()
    before = set(vars(model)), set(vars(model.model))
    fresh = answer(model, PROMPT, video(25))[1]
    merged = answer(model, PROMPT, video(25), inner=INNER)[1]
    assert not torch.allclose(merged, fresh, atol=1e-3)
    torch.testing.assert_close(answer(model, PROMPT, video(25))[1], fresh, rtol=0, atol=0)
    torch.testing.assert_close(answer(model, PROMPT, video(25), inner=INNER)[1], merged, rtol=0, atol=0)
    assert (set(vars(model)), set(vars(model.model))) == before


def test_without_a_cache_every_step_is_a_prefill() -> None:
    model = tiny()
    embeds, span = embed_prompt(model, PROMPT, video(25))
    request = {"inner": INNER, "visual_spans": [span]}
    for _ in range(3):
        with torch.no_grad():
            out = model(inputs_embeds=embeds, use_cache=False, **request)
            cached = model(inputs_embeds=embeds, use_cache=True, **request)
        assert out.past_key_values is None and cached.past_key_values is not None
        assert out.logits.shape[1] == embeds.shape[1] - 13
        torch.testing.assert_close(out.logits, cached.logits, rtol=1e-4, atol=1e-5)
        expected = reference(tiny("eager"), embeds, span, INNER, [])
        torch.testing.assert_close(out.logits[0, -1:], expected, rtol=1e-4, atol=1e-4)
        embeds = torch.cat([embeds, model.get_input_embeddings()(out.logits[:, -1:].argmax(-1))], dim=1)
    # transformers caches whatever starts from embeddings: asking for no cache changes nothing
    torch.testing.assert_close(
        answer(model, PROMPT, video(25), inner=INNER, use_cache=False)[1],
        answer(model, PROMPT, video(25), inner=INNER)[1],
    )


@pytest.mark.parametrize("spans", [None, [(0, 0)], [(3, 1)]])
def test_nothing_to_merge(spans: Any) -> None:
    embeds, _ = embed_prompt(tiny(), PROMPT, video(25))
    _, merged, _ = by_hand(tiny(), embeds, spans, INNER, 2)
    _, plain, _ = by_hand(tiny(), embeds, None, None, 2)
    assert torch.equal(merged, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", METHODS)
def test_half_precision(dtype: torch.dtype, inner: InnerMerging) -> None:
    logits = answer(build().to(dtype), PROMPT, video(25), new=3, inner=inner)[1]
    assert logits.shape == (1, 3, 512) and logits.isfinite().all()


@five_only
def test_hidden_states_of_every_layer() -> None:
    embeds, span = embed_prompt(tiny(), PROMPT, video(25))
    with torch.no_grad():
        out = tiny()(inputs_embeds=embeds, inner=INNER, visual_spans=[span], output_hidden_states=True)
    assert [hidden.shape[1] for hidden in out.hidden_states] == [32] * 4 + [19] * 3


def test_an_object_that_holds_the_model() -> None:
    ids = generate(SimpleNamespace(language=tiny()), torch.tensor(PROMPT), video(9), max_new_tokens=2)
    assert ids.tolist() == generate(tiny(), PROMPT, video(9), max_new_tokens=2).tolist()


def test_embed_prompt() -> None:
    embeds, span = embed_prompt(tiny(), PROMPT, video(9).double())
    assert embeds.shape == (1, 16, 64) and embeds.dtype == torch.float32 and span == (3, 9)
    assert torch.equal(embeds[0, 3:12], video(9))
    words = tiny().get_input_embeddings()(torch.tensor([5, 6, 7, 11, 12, 13, 14]))
    assert torch.equal(torch.cat([embeds[0, :3], embeds[0, 12:]]), words)


@pytest.mark.parametrize(
    "prompt, tokens, said",
    [
        ([1, 2], video(4), "0 video tokens"),
        ([VIDEO_TOKEN, 2, VIDEO_TOKEN], video(4), "2 video tokens"),
        ([VIDEO_TOKEN, 512], video(4), "0..511"),
        ([VIDEO_TOKEN, -1], video(4), "0..511"),
        ([[VIDEO_TOKEN, 1]], video(4), "list of token ids"),
        ([VIDEO_TOKEN, 1], video(4)[:, :5], r"\[V, 64\]"),
        ([VIDEO_TOKEN, 1], video(4)[:0], r"\[V, 64\]"),
        ([[VIDEO_TOKEN, 1]] * 3, [video(4), video(4)], "3 prompts do not go with 2 videos"),
    ],
)
def test_refused_prompts(prompt: Any, tokens: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        generate(tiny(), prompt, tokens, max_new_tokens=1)


def test_refused_models_and_layers() -> None:
    with pytest.raises(InputError, match="object cannot generate"):
        generate(object(), PROMPT, video(4), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"the model has 6 layers, so the layer must lie in 1\.\.5"):
        generate(tiny(), PROMPT, video(4), inner=InnerMerging(6), max_new_tokens=1)
    windows = build(use_sliding_window=True, sliding_window=8, max_window_layers=3)
    generate(windows, PROMPT, video(20), max_new_tokens=1)
    with pytest.raises(ConfigError, match="sliding-window"):
        generate(windows, PROMPT, video(20), inner=INNER, max_new_tokens=1)


def test_refused_calls() -> None:
    model = tiny()
    embeds, span = embed_prompt(model, PROMPT, video(25))
    request = {"inner": INNER, "visual_spans": [span]}
    with pytest.raises(InputError, match="whose layers may differ"):
        generate(model, PROMPT, video(25), inner=INNER, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(InputError, match="attention_mask has shape"):
        model(inputs_embeds=embeds, attention_mask=torch.ones(1, 31), **request)
    with pytest.raises(InputError, match="padded on the left"):
        model(inputs_embeds=embeds, attention_mask=torch.tensor([[1] * 31 + [0]]), **request)
    with pytest.raises(InputError, match="one prefill"):
        model(inputs_embeds=embeds[:, :16], **request)
    with pytest.raises(InputError, match="labels"):
        model(inputs_embeds=embeds, labels=torch.zeros(1, 32, dtype=torch.long), **request)
    token = torch.tensor([[1]])
    for first, then, said in ((request, {}, "other settings"), ({}, request, "nothing had been merged")):
        with torch.no_grad(), pytest.raises(InputError, match=said):
            past = model(inputs_embeds=embeds, **first).past_key_values
            model(input_ids=token, past_key_values=past, **then)
