"""Exact top-k search in blocks: memory depends on the block and k, never on the number of documents."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def exact_search(
    queries: Tensor,
    blocks: Iterable[tuple[int, Tensor]],
    top_k: int,
    *,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the documents with the highest dot products, leaving out given pairs of query and document.

    Args:
        queries: [Q, dim].
        blocks: documents as (number of the first one, [n, dim]), in any split; moved to the queries' device and dtype.
        top_k: documents to find per query.
        excluded_rows, excluded_ids: [E] each, int64: query `excluded_rows[i]` must not get document `excluded_ids[i]`.

    Returns:
        Scores [Q, top_k] in falling order, document numbers [Q, top_k] (int64), and the scores [E] of the excluded
        pairs. Where there are fewer documents than `top_k`, scores are -inf and numbers -1. Excluded documents that
        no block holds keep the score -inf.
    """
    scores = queries.new_full((len(queries), top_k), float("-inf"))
    ids = torch.full((len(queries), top_k), -1, dtype=torch.int64, device=queries.device)
    excluded_ids, order = excluded_ids.sort()
    excluded_rows = excluded_rows[order]
    excluded_scores = queries.new_full((len(order),), float("-inf"))
    for start, block in blocks:
        products = queries @ block.to(queries).T
        ends = torch.tensor([start, start + len(block)], device=queries.device)
        low, high = torch.searchsorted(excluded_ids, ends).tolist()
        where = (excluded_rows[low:high], excluded_ids[low:high] - start)
        excluded_scores[order[low:high]] = products[where]
        products[where] = float("-inf")
        if not torch.isfinite(scores).any():  # the first block
            values, columns = products.topk(min(top_k, len(block)), dim=1)
        else:
            values, columns = _above(products, scores[:, -1:])
        scores, best = torch.cat([scores, values], dim=1).topk(top_k, dim=1)
        ids = torch.cat([ids, columns + start], dim=1).gather(1, best)
    return scores, ids.masked_fill(scores == float("-inf"), -1), excluded_scores


def _above(products: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The few products [Q, n] above a row's threshold [Q, 1], packed to the left: values and columns [Q, most].

    After the first blocks almost nothing beats the k-th best, and picking it out costs a fraction of a full top-k.
    """
    rows, columns = (products > threshold).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(products))
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(products), int(counts.max()))
    packed_values = products.new_full(shape, float("-inf"))
    packed_columns = torch.zeros(shape, dtype=torch.int64, device=rows.device)
    packed_values[rows, slots] = products[rows, columns]
    packed_columns[rows, slots] = columns
    return packed_values, packed_columns
