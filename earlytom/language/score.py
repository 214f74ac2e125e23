"""How much the last token looks at each of the others: what inner merging keeps visual tokens by."""

from __future__ import annotations

from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, rotate_half

from .devices import execution_device, weights_at_hand


def last_query_attention(
    layer: Qwen2DecoderLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    visible: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Attention that the last token pays to every token in `layer`, averaged over heads: [B, N] float32.

    hidden [B, N, D] enters the layer; rotary: cosines and sines [B or 1, N, head width]; visible [B, N]: 0 for padding.
    keys [B, G, N, head width]: those that the layer has cached, rotated; with them hidden and rotary may be those of
    the last tokens alone. One row for each head is formed, never an [N, N] matrix: nothing comes after the last token,
    so the row is causal. All of it is computed where the layer is, wherever the arguments are.
    """
    attention = layer.self_attn
    with weights_at_hand(layer, attention):  # its parts are called by themselves
        device = execution_device(attention.q_proj)
        hidden = hidden.to(device)
        cos, sin = (x.to(device)[:, None] for x in rotary)  # [B or 1, 1, N, d]
        if keys is None:
            keys = _heads(attention.k_proj(layer.input_layernorm(hidden)), attention)  # [B, G, N, d]
            keys = keys * cos + rotate_half(keys) * sin
        query = _heads(attention.q_proj(layer.input_layernorm(hidden[:, -1:])), attention)  # [B, H, 1, d]
    query = query * cos[:, :, -1:] + rotate_half(query) * sin[:, :, -1:]
    grouped = query.reshape(len(query), keys.shape[1], -1, attention.head_dim)  # [B, G, H / G, d]
    logits = grouped.float() @ keys.float().transpose(2, 3) * attention.scaling  # [B, G, H / G, N]
    if visible is not None:
        logits = logits.masked_fill(~visible.to(device).bool()[:, None, None], float("-inf"))
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _heads(states: Tensor, attention: Qwen2Attention) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return states.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
