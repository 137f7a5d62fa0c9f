"""Retrieval on the rows of a dataset: does a query find its positive among the documents of its task type?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..instructions import format_query
from ..metrics.ranking import NDCG, Accuracy


@dataclass(frozen=True)
class RetrievalResult:
    """Scores of one task type, each in [0, 1], and where the right document stands for each query."""

    num_queries: int
    num_documents: int
    ndcg_at_10: float
    accuracy: float  # the first document is the right one (recall@1)
    ranks: list[int]  # of the positive of each query, from 1


def evaluate_rows(
    rows: Iterable[Mapping[str, Any]], encode: Callable[[list[str]], Tensor]
) -> dict[str, RetrievalResult]:
    """Rank, for each row, all documents of its task type by their similarity to the row's query.

    The documents of a task type are the distinct positives and negatives of its rows; one of them is relevant to a
    query, its positive.

    Args:
        rows: Rows with `task_type`, `instruction`, `query`, `positive` and optionally `negative`, as of
            `hf-e5 build`.
        encode: Embeds texts, [n, dim] with unit norm; called once. Queries come with their instruction in front.

    Returns:
        One result per task type, in the order of their first rows.
    """
    by_type: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_type[row["task_type"]].append(row)
    corpora = {
        name: list(dict.fromkeys(text for row in group for text in (row["positive"], row.get("negative")) if text))
        for name, group in by_type.items()
    }
    queries = [format_query(row["query"], row["instruction"]) for group in by_type.values() for row in group]
    documents = [text for corpus in corpora.values() for text in corpus]
    vectors = encode([*queries, *documents])
    query_vectors = vectors[: len(queries)].split([len(group) for group in by_type.values()])
    document_vectors = vectors[len(queries) :].split([len(corpus) for corpus in corpora.values()])
    results = {}
    for (name, group), ours, theirs in zip(by_type.items(), query_vectors, document_vectors, strict=True):
        place = {text: number for number, text in enumerate(corpora[name])}
        right = [place[row["positive"]] for row in group]
        ranked = (ours @ theirs.T).argsort(dim=1, descending=True, stable=True).tolist()
        found = {"predictions": ranked, "references": [[document] for document in right]}
        results[name] = RetrievalResult(
            num_queries=len(group),
            num_documents=len(theirs),
            **NDCG().compute(**found),
            **Accuracy().compute(**found),
            ranks=[documents.index(document) + 1 for documents, document in zip(ranked, right, strict=True)],
        )
    return results


def comparison_table(before: Mapping[str, RetrievalResult], after: Mapping[str, RetrievalResult]) -> str:
    """Two models side by side: nDCG@10 and recall@1 by task type, and their means over the task types."""
    line = "{:<12} {:>8} {:>10}   {:>7} -> {:<7}   {:>7} -> {:<7}"
    lines = [line.format("task type", "queries", "documents", "nDCG@10", "", "rec@1", "")]
    pairs = {name: (before[name], after[name]) for name in before}
    for name, (old, new) in pairs.items():
        scores = (old.ndcg_at_10, new.ndcg_at_10, old.accuracy, new.accuracy)
        lines.append(line.format(name, old.num_queries, old.num_documents, *(f"{score:.3f}" for score in scores)))
    means = [
        sum(getattr(pair[side], metric) for pair in pairs.values()) / len(pairs)
        for metric in ("ndcg_at_10", "accuracy")
        for side in (0, 1)
    ]
    lines.append(line.format("mean", "", "", *(f"{mean:.3f}" for mean in means)))
    return "\n".join(lines)


def share_found(results: Iterable[RetrievalResult], cutoffs: Sequence[int]) -> list[float]:
    """Share of all queries whose right document is among the first k, for each k of `cutoffs`."""
    ranks = [rank for result in results for rank in result.ranks]
    return [sum(rank <= cutoff for rank in ranks) / len(ranks) for cutoff in cutoffs]
