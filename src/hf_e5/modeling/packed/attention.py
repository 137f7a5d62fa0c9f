"""Causal attention over a pack (`layout.py`): memory linear in the tokens, no mask tensor, no work across texts.

On CUDA in half precision it is torch's variable-length flash attention. Elsewhere it is plain matrix products over
groups of like length, whose backward pass is much faster than that of torch's own CPU kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .layout import BLOCK, Group, Pack


NAME = "hf_e5_packed"


def packed_attention(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    """Attend within each text of a pack.

    Args:
        query: [T, heads, head_dim].
        key: [T, kv_heads, head_dim]; `heads` is a multiple of `kv_heads` (grouped-query attention).
        value: like `key`.
        pack: whose T tokens these are.
        scale: of the scores, usually head_dim ** -0.5.

    Returns:
        [T, heads, head_dim].
    """
    # Under autocast with fp32 weights, rotary embedding returns fp32 where `value` has the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash_attention(query, key, value, pack, scale)
    return _PackedAttention.apply(query, key, value, pack.groups, scale)


def register() -> None:
    """Make `attn_implementation="hf_e5_packed"` known to transformers; its modules then need `pack=` at forward."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _interface)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, pack, scale)[None], None


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer key-value heads without being told; later versions want to be told.
    has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    flags: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if has_flag else {}
    layout = pack.flash_layout
    if layout.key_rows is not None:
        key, value = key.index_select(0, layout.key_rows), value.index_select(0, layout.key_rows)
    attended = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.query_offsets,
        layout.key_offsets,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned at the last token of query and key
        **flags,
    )
    assert isinstance(attended, Tensor)
    return attended


class _PackedAttention(torch.autograd.Function):
    """Keeps queries, keys and values only; the probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scale = groups, scale
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in groups:
            states = _GroupStates(group, query, key, value, scale)
            attended = torch.empty_like(states.queries)
            for rows, probabilities, values in states.blocks():
                attended[:, rows] = torch.bmm(probabilities, values)
            states.store(attended, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        for group in ctx.groups:
            states = _GroupStates(group, query, key, value, ctx.scale)
            grad_attended = states.by_head(grad_output)
            grad_queries = torch.empty_like(states.queries)
            grad_keys, grad_values = torch.zeros_like(states.keys), torch.zeros_like(states.values)
            for rows, probabilities, values in states.blocks():
                stop = values.shape[1]
                grad_block = grad_attended[:, rows]
                grad_values[:, :stop].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    torch.bmm(grad_block, values.transpose(1, 2)), probabilities, -1, query.dtype
                )
                grad_keys[:, :stop].baddbmm_(grad_scores.transpose(1, 2), states.queries[:, rows], alpha=ctx.scale)
                grad_queries[:, rows] = _scaled_product(grad_scores, states.keys[:, :stop], ctx.scale)
            states.store(grad_queries, grad_query)
            states.store_with_prefix(grad_keys, grad_key)
            states.store_with_prefix(grad_values, grad_value)
        return grad_query, grad_key, grad_value, None, None


class _GroupStates:
    """Queries, keys and values of one group, by text and key-value head: the shapes of batched matrix products.

    n texts, k key-value heads, r query heads for each of them, L positions, P tokens of shared prefix, d head_dim.
    """

    def __init__(self, group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float):
        self.group, self.scale = group, scale
        self.kv_heads, self.repeats = key.shape[1], query.shape[1] // key.shape[1]
        self.prefix_length = group.prefix[1] - group.prefix[0]
        self.queries = self.by_head(query)  # [n * k, L * r, d]
        self.keys, self.values = self._with_prefix(key), self._with_prefix(value)  # [n * k, P + L, d]

    def by_head(self, states: Tensor) -> Tensor:
        """[T, heads, d] -> [n * k, L * heads / k, d]; zero where a text has ended."""
        group = self.group
        rows = states[group.start : group.stop]
        if group.padded is not None:
            rows = states.new_zeros(group.num_texts * group.length, *states.shape[1:]).index_copy_(
                0, group.padded, rows
            )
        rows = rows.reshape(group.num_texts, group.length, self.kv_heads, -1).transpose(1, 2)
        return rows.reshape(group.num_texts * self.kv_heads, -1, states.shape[-1])

    def _with_prefix(self, states: Tensor) -> Tensor:
        own = self.by_head(states)  # [n * k, L, d]
        if not self.prefix_length:
            return own
        prefix = states[slice(*self.group.prefix)].transpose(0, 1)  # [k, P, d]
        return torch.cat([prefix.repeat(self.group.num_texts, 1, 1), own], dim=1)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per block of queries: its rows, probabilities [n * k, rows, P + stop], values [n * k, P + stop, d]."""
        for start in range(0, self.group.length, BLOCK):
            stop = min(start + BLOCK, self.group.length)
            rows = slice(start * self.repeats, stop * self.repeats)
            keys, values = (states[:, : self.prefix_length + stop] for states in (self.keys, self.values))
            scores = _scaled_product(self.queries[:, rows], keys.transpose(1, 2), self.scale)
            scores[..., self.prefix_length + start :] += _causal_bias(
                stop - start, self.repeats, scores.dtype, scores.device
            )
            yield rows, torch.softmax(scores, dim=-1), values

    def store(self, states: Tensor, out: Tensor) -> None:
        """Write the texts' `states` [n * k, L * r, d] to their rows of `out` [T, k * r, d]."""
        group = self.group
        rows = states.reshape(group.num_texts, self.kv_heads, group.length, -1).transpose(1, 2)
        if group.padded is None:
            out[group.start : group.stop] = rows.reshape(-1, *out.shape[1:])
        else:
            rows = rows.reshape(group.num_texts * group.length, *out.shape[1:])
            torch.index_select(rows, 0, group.padded, out=out[group.start : group.stop])

    def store_with_prefix(self, grad: Tensor, out: Tensor) -> None:
        """Write gradients [n * k, P + L, d] of the texts' own keys into `out` [T, k, d]; add those of the prefix."""
        if self.prefix_length:
            by_text = grad[:, : self.prefix_length].unflatten(0, (-1, self.kv_heads))  # [n, k, P, d]
            out[slice(*self.group.prefix)] += by_text.sum(dim=0).transpose(0, 1)
        self.store(grad[:, self.prefix_length :], out)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


@cache
def _causal_bias(length: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length * repeats, length]: -inf where a key comes after the query, else 0."""
    bias = torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)
    return bias.repeat_interleave(repeats, dim=0)
