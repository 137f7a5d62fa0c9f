"""Which texts go through the model together: packs where the backbone allows it, else padded batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .decoder import supports_packing
from .layout import Pack, make_packs


# Token budget of a forward pass of texts that are only embedded.
FORWARD_TOKENS = 8192


@dataclass(frozen=True)
class PaddedBatch:
    """n texts padded to the longest of them, always behind the text.

    Left padding would shift the texts' positions in models that number them from the row's start (GPT-2, BERT).
    """

    input_ids: Tensor  # [n, L]
    attention_mask: Tensor  # [n, L]
    texts: Tensor  # [n] int64, which of the caller's texts these are

    @property
    def num_tokens(self) -> int:
        """What the linear layers compute, padding included."""
        return self.input_ids.numel()

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


MicroBatch = Pack | PaddedBatch


def make_micro_batches(
    backbone: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    lengths: Tensor,
    *,
    pooling: str,
    max_tokens: int = sys.maxsize,
    prefix_lengths: Tensor | None = None,
    texts: Sequence[int] | None = None,
) -> Sequence[MicroBatch]:
    """Cut texts into micro-batches of at most `max_tokens` tokens each, longest first.

    A text longer than the budget is a micro-batch alone. `backbone` decides whether texts are packed, and on which
    device they lie; the other arguments are those of [`make_packs`]. Prefixes are not shared in padded batches, or
    where `pooling` reads their rows.
    """
    device, lengths = backbone.device, lengths.cpu()
    if supports_packing(backbone, int(lengths.max())):
        prefix_lengths = prefix_lengths if pooling == "last" else None
        return make_packs(
            input_ids, lengths, max_tokens=max_tokens, prefix_lengths=prefix_lengths, device=device, texts=texts
        )
    order = lengths.argsort(descending=True, stable=True)
    if texts is not None:
        order = order[torch.isin(order, torch.tensor(texts))]
    sequences = input_ids.split(lengths.tolist())
    batches: list[MicroBatch] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        chosen = order[start : start + max(1, max_tokens // longest)]
        padded = pad_sequence([sequences[text] for text in chosen], batch_first=True)
        mask = (torch.arange(longest) < lengths[chosen, None]).long()
        batches.append(PaddedBatch(padded.to(device), mask.to(device), chosen.to(device)))
        start += len(chosen)
    return batches


def forward_batches(
    backbone: PreTrainedModel | PeftModel, ids: list[list[int]], *, pooling: str, batch_size: int | None = None
) -> Iterator[MicroBatch]:
    """Micro-batches of texts that are only embedded; the prefix that all of them share is computed once per pack.

    Args:
        backbone, pooling: as in `make_micro_batches`.
        ids: token ids of each text, at least one token each.
        batch_size: texts of one forward pass; by default as many as fit 8,192 tokens, but at least one.
    """
    if not ids:
        return
    lengths = torch.tensor([len(text) for text in ids])
    # The prefix of all texts, usually the instruction; each must keep a token of its own.
    shared = min(len(os.path.commonprefix(ids)), int(lengths.min()) - 1)
    input_ids = torch.tensor([token for text in ids for token in text])
    for part in lengths.argsort(descending=True, stable=True).split(batch_size or len(ids)):
        yield from make_micro_batches(
            backbone,
            input_ids,
            lengths,
            pooling=pooling,
            max_tokens=sys.maxsize if batch_size else FORWARD_TOKENS,
            prefix_lengths=torch.full_like(lengths, shared),
            texts=part.tolist(),
        )
