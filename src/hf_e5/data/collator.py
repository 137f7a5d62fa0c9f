"""Batches for the contrastive step: every distinct text of the step once, unpadded, with index arrays.

What is a duplicate is decided by tokens: a query and a document with the same words differ by the instruction, and so
do their embeddings. Packing and padding are left to the step, which knows the memory (`training/gradcache.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..records import stable_hash


class E5DataCollator:
    """Turn rows of `hf_e5.data.tokenization.tokenize_dataset` into one contrastive batch.

    Called with B rows that hold T tokens in U distinct texts and M negatives (any number per row, also none), it
    returns int64 tensors. `queries` stands first because accelerate and the Trainer read the batch size off the first
    entry; there is no `labels` entry because that would change the Trainer's loss scaling.

    | key              | shape | content |
    |------------------|-------|---------|
    | `queries`        | [B]   | index of each row's query among the U texts |
    | `positives`      | [B]   | index of each row's positive |
    | `negatives`      | [M]   | indices of the hard negatives, row after row |
    | `negative_rows`  | [M]   | the row that each of them belongs to |
    | `input_ids`      | [T]   | the tokens of all U texts, one text after the other |
    | `lengths`        | [U]   | tokens of each text, at least 1 |
    | `prefix_lengths` | [U]   | how many leading tokens are a query's instruction; 0 for documents |
    | `text_hashes`    | [U]   | 64-bit hash of the tokens, equal on every rank and in every run |

    Index arrays of different lengths cannot be sliced along one batch dimension: use accelerate's default
    `dispatch_batches=False`. `split_batches` is fine, as it cuts the list of rows before they are collated.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts: dict[bytes, int] = {}  # tokens -> index, in order of first appearance
        prefix_lengths: list[int] = []

        def index(ids: Sequence[int], prefix_length: int = 0) -> int:
            position = texts.setdefault(np.asarray(ids, dtype=np.int64).tobytes(), len(texts))
            if position == len(prefix_lengths):
                prefix_lengths.append(prefix_length)
            return position

        queries = [index(row["query_ids"], row.get("query_prefix_length", 0)) for row in rows]
        positives = [index(row["positive_ids"]) for row in rows]
        negatives = [index(ids) for row in rows for ids in row.get("negative_ids") or ()]
        negative_rows = [position for position, row in enumerate(rows) for _ in row.get("negative_ids") or ()]
        return {
            "queries": torch.tensor(queries),
            "positives": torch.tensor(positives),
            "negatives": torch.tensor(negatives, dtype=torch.int64),
            "negative_rows": torch.tensor(negative_rows, dtype=torch.int64),
            "input_ids": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.int64),
            "lengths": torch.tensor([len(text) // 8 for text in texts]),
            "prefix_lengths": torch.tensor(prefix_lengths),
            "text_hashes": torch.tensor([stable_hash(text) >> 1 for text in texts]),
        }
