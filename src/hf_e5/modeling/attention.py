"""Causal attention over a pack (`packing.py`): memory linear in the tokens, no mask tensor, no work across texts.

On CUDA in half precision it is torch's variable-length flash attention. Elsewhere it is plain matrix products over
groups of nearly equal length, which torch's own CPU kernel does not come near in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Group, Pack


NAME = "hf_e5_packed"

# Queries of a text per block: keys after a block's last query are never multiplied.
BLOCK = 128


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
        enable_gqa=query.shape[1] != key.shape[1],
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
            blocks = [torch.bmm(probabilities, values) for _, probabilities, values in states.blocks()]
            output[group.start : group.stop] = states.flat_queries(blocks)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        for group in ctx.groups:
            states = _GroupStates(group, query, key, value, ctx.scale)
            grad_heads = states.by_head(grad_output)
            grad_keys, grad_values = torch.zeros_like(states.keys), torch.zeros_like(states.values)
            grad_blocks = []
            for block, probabilities, values in states.blocks():
                stop = values.shape[1]
                grad_block = states.block_of(grad_heads, block)
                grad_values[:, :stop].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    torch.bmm(grad_block, values.transpose(1, 2)), probabilities, -1, query.dtype
                ).mul_(ctx.scale)
                grad_keys[:, :stop].baddbmm_(grad_scores.transpose(1, 2), states.block_of(states.queries, block))
                grad_blocks.append(torch.bmm(grad_scores, states.keys[:, :stop]))
            grad_query[group.start : group.stop] = states.flat_queries(grad_blocks)
            states.add_flat_keys(grad_keys, grad_key)
            states.add_flat_keys(grad_values, grad_value)
        return grad_query, grad_key, grad_value, None, None


class _GroupStates:
    """Queries, keys and values of one group, by text and key-value head: the shapes of batched matrix products.

    n texts, k key-value heads, r query heads for each of them, L positions, P tokens of shared prefix, d head_dim.
    """

    def __init__(self, group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float):
        self.group, self.scale = group, scale
        self.num_heads, self.kv_heads = query.shape[1], key.shape[1]
        self.prefix_length = group.prefix[1] - group.prefix[0]
        self.queries = self.by_head(query)  # [n * k, r, L, d]
        self.keys, self.values = self._with_prefix(key), self._with_prefix(value)  # [n * k, P + L, d]

    def by_head(self, states: Tensor) -> Tensor:
        """[T, heads, d] -> [n * k, heads / k, L, d]; zero where a text has ended."""
        group = self.group
        rows = states[group.start : group.stop]
        if group.padded is not None:
            rows = states.new_zeros(group.num_texts * group.length, *states.shape[1:]).index_copy_(
                0, group.padded, rows
            )
        rows = rows.reshape(group.num_texts, group.length, self.kv_heads, -1, states.shape[-1])
        return rows.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def _with_prefix(self, states: Tensor) -> Tensor:
        own = self.by_head(states).squeeze(1)  # [n * k, L, d]
        if not self.prefix_length:
            return own.contiguous()
        prefix = states[slice(*self.group.prefix)].transpose(0, 1)  # [k, P, d]
        return torch.cat([prefix.repeat(self.group.num_texts, 1, 1), own], dim=1)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Per block of queries: its rows, probabilities [n * k, r * rows, P + stop], values [n * k, P + stop, d]."""
        length = self.group.length
        size = -(-length // -(-length // BLOCK))
        for start in range(0, length, size):
            stop = min(start + size, length)
            keys, values = (states[:, : self.prefix_length + stop] for states in (self.keys, self.values))
            query = self.block_of(self.queries, slice(start, stop))
            scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=self.scale)
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu_(1)
            last_keys = scores.unflatten(1, (-1, stop - start))[..., self.prefix_length + start :]
            last_keys.masked_fill_(future, -torch.inf)
            yield slice(start, stop), torch.softmax(scores, dim=-1), values

    def block_of(self, states: Tensor, rows: slice) -> Tensor:
        """[n * k, r, L, d] -> [n * k, r * rows, d]"""
        return states[:, :, rows].flatten(1, 2)

    def flat_queries(self, blocks: list[Tensor]) -> Tensor:
        """Blocks [n * k, r * rows, d] -> [rows of the group, heads, d]"""
        repeats = self.num_heads // self.kv_heads
        states = torch.cat([block.unflatten(1, (repeats, -1)) for block in blocks], dim=2)  # [n * k, r, L, d]
        states = states.unflatten(0, (-1, self.kv_heads)).permute(0, 3, 1, 2, 4)  # [n, L, k, r, d]
        return self._unpad(states.flatten(2, 3).flatten(0, 1))

    def add_flat_keys(self, grad: Tensor, out: Tensor) -> None:
        """Write gradients [n * k, P + L, d] of own keys into `out` [T, k, d] and add those of the prefix."""
        grad = grad.unflatten(0, (-1, self.kv_heads)).transpose(1, 2)  # [n, P + L, k, d]
        if self.prefix_length:
            out[slice(*self.group.prefix)] += grad[:, : self.prefix_length].sum(dim=0)
        out[self.group.start : self.group.stop] = self._unpad(grad[:, self.prefix_length :].flatten(0, 1))

    def _unpad(self, rows: Tensor) -> Tensor:
        return rows if self.group.padded is None else rows.index_select(0, self.group.padded)
