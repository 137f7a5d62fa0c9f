"""Which texts go through the model together when they are only embedded: packs, or padded batches where it must be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .packed import supports_packing
from .packing import make_packs


if TYPE_CHECKING:
    from .encoder import E5Model

# Token budget of one forward when no batch size is given.
FORWARD_TOKENS = 8192


def batches(
    model: E5Model, ids: list[list[int]], batch_size: int | None = None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Cut texts into forward passes, longest first, so that a budget that is too large shows at once.

    In packs, what all texts begin with (an instruction) is computed once per pack.

    Args:
        model: Its backbone decides whether packs give what the model defines.
        ids: Token ids of each text, at least one token each.
        batch_size: Texts of one forward; by default as many as fit 8,192 tokens, but at least one.

    Yields:
        The places in `ids` of the vectors that the forward pass returns, and its keyword arguments.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    if order and supports_packing(model.backbone, len(ids[order[0]])):
        yield from _packs(model, ids, order, batch_size)
    else:
        yield from _padded(model, ids, order, batch_size)


def _packs(
    model: E5Model, ids: list[list[int]], order: list[int], batch_size: int | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    # What all texts begin with, whoever wrote it there. Poolings other than `last` read those rows of every text.
    shared = min(len(os.path.commonprefix(ids)), len(ids[order[-1]]) - 1) if model.pooling == "last" else 0
    size, max_tokens = (batch_size, sys.maxsize) if batch_size else (len(order), FORWARD_TOKENS)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        lengths = torch.tensor([len(ids[i]) for i in part])
        packs = make_packs(
            torch.tensor([token for i in part for token in ids[i]]),
            lengths,
            max_tokens=max_tokens,
            prefix_lengths=torch.full_like(lengths, shared),
            device=model.device,
        )
        for pack in packs:
            yield [part[i] for i in pack.texts.tolist()], {"pack": pack}


def _padded(
    model: E5Model, ids: list[list[int]], order: list[int], batch_size: int | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    start = 0
    while start < len(order):
        size = batch_size or max(1, FORWARD_TOKENS // len(ids[order[start]]))
        part = order[start : start + size]
        yield part, model.pad([ids[i] for i in part])
        start += size
