"""The optional check with an embedding model: the positive must be nearer to the query than the hard negative."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import IO, Any

import numpy as np


DEFAULT_MARGIN = 0.0
_BATCH = 256


class Margins:
    """Cosine similarities of query to positive and to negative, by record id."""

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.scores: dict[str, tuple[float, float]] = {}

    def verdict(self, record_id: str) -> tuple[str, str] | None:
        """Return (filter, reason) if the record's positive does not beat its negative by the margin."""
        if record_id not in self.scores:
            return None
        positive, negative = self.scores[record_id]
        if positive - negative >= self.margin:
            return None
        return "weak_negative", f"margin {positive - negative:.3f} (positive {positive:.3f}, negative {negative:.3f})"

    def write(self, file: IO[str]) -> None:
        """Write one row per checked record: id, both similarities and their difference."""
        file.write("id\tpositive\tnegative\tmargin\n")
        for record_id, (positive, negative) in self.scores.items():
            file.write(f"{record_id}\t{positive:.4f}\t{negative:.4f}\t{positive - negative:.4f}\n")


def check_margins(records: Iterable[dict[str, Any]], model: Any, margin: float = DEFAULT_MARGIN) -> Margins:
    """Score the records that have a negative, in batches.

    Args:
        records: rows with id, query, positive and negative.
        model: a SentenceTransformer; it applies its own query and document prompts.
        margin: least similarity(query, positive) - similarity(query, negative), -2 to 2.
    """
    margins = Margins(margin)
    with_negative = (record for record in records if record.get("negative"))
    while batch := list(islice(with_negative, _BATCH)):
        queries = _encode(model.encode_query, [record["query"] for record in batch])
        positives = _encode(model.encode_document, [record["positive"] for record in batch])
        negatives = _encode(model.encode_document, [record["negative"] for record in batch])
        to_positive = (queries * positives).sum(axis=1)
        to_negative = (queries * negatives).sum(axis=1)
        for record, positive, negative in zip(batch, to_positive.tolist(), to_negative.tolist(), strict=True):
            margins.scores[record["id"]] = (positive, negative)
    return margins


def _encode(encode, texts: list[str]) -> np.ndarray:
    """Return unit vectors: float32 [texts, dim]."""
    return encode(texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
