"""Pooling: from one hidden state per token to one vector per text."""

from __future__ import annotations

import torch
from torch import Tensor


POOLINGS = ("last", "mean", "weighted_mean", "first")


def pool(hidden: Tensor, attention_mask: Tensor, mode: str = "last") -> Tensor:
    """Pool hidden states by attention mask, for either padding side and without a device sync.

    Args:
        hidden: Last hidden states, [batch, tokens, dim], any float dtype.
        attention_mask: 1 for a token of the text and 0 for padding, [batch, tokens], int or bool.
        mode: `last` (the token at EOS; the paper's choice), `mean`, `weighted_mean` (SGPT: the i-th token of a text
            weighs i; paper, table 5) or `first`.

    Returns:
        [batch, dim]; the dtype of `hidden` for `last` and `first`, fp32 for the means.

    Raises:
        ValueError: `mode` is not one of `POOLINGS`.
    """
    if mode in ("last", "first"):
        # An index instead of a masked B x T x D product: a quarter of the memory traffic, and nothing to round.
        mask = attention_mask.to(torch.int32)
        if mode == "first":
            index = mask.argmax(dim=1)
        else:
            index = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
    if mode == "mean":
        weights = attention_mask.float()
    elif mode == "weighted_mean":
        mask = attention_mask.float()
        weights = mask.cumsum(dim=1) * mask
    else:
        raise ValueError(f"unknown pooling {mode!r}: choose from {', '.join(POOLINGS)}")
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.bmm(weights.unsqueeze(1), hidden.float()).squeeze(1)
