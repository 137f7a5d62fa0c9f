"""Micro-batches of a contrastive batch: packs where the backbone allows it, else padded batches of similar lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..modeling.encoder import E5Model
from ..modeling.packed import supports_packing
from ..modeling.packing import Pack, make_packs


@dataclass(frozen=True)
class PaddedBatch:
    """n texts padded to the longest of them."""

    input_ids: Tensor  # [n, L]
    attention_mask: Tensor  # [n, L]
    texts: Tensor  # [n] int64, which of the batch's texts these are

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


MicroBatch = Pack | PaddedBatch


def make_micro_batches(
    model: E5Model, batch: dict[str, Tensor], max_tokens: int, texts: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Cut the texts of a batch of [`~hf_e5.E5DataCollator`] into micro-batches of at most `max_tokens` tokens each.

    Longest first. A text longer than the budget is a micro-batch alone. `texts`: take only these.
    """
    device = batch["input_ids"].device
    lengths = batch["lengths"].cpu()
    if supports_packing(model.backbone, int(lengths.max())):
        prefix_lengths = batch["prefix_lengths"].cpu() if model.pooling == "last" else None
        return list(
            make_packs(
                batch["input_ids"],
                lengths,
                max_tokens=max_tokens,
                prefix_lengths=prefix_lengths,
                device=device,
                texts=texts,
            )
        )
    order = lengths.argsort(descending=True, stable=True)
    if texts is not None:
        order = order[torch.isin(order, torch.tensor(texts))]
    sequences = batch["input_ids"].split(lengths.tolist())
    side = model.tokenizer.padding_side
    batches: list[MicroBatch] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        chosen = order[start : start + max(1, max_tokens // longest)]
        input_ids = pad_sequence(
            [sequences[text] for text in chosen], batch_first=True, padding_value=0, padding_side=side
        )
        mask = torch.arange(longest) < lengths[chosen, None]
        mask = (mask.flip(1) if side == "left" else mask).long()
        batches.append(PaddedBatch(input_ids, mask.to(device), chosen.to(device)))
        start += len(chosen)
    return batches
