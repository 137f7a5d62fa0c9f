"""Ranking metrics as `evaluate.Metric` subclasses: instantiate them, nothing is downloaded.

All take, per query, the ids of the retrieved documents from best to worst and the ids of the relevant ones.

>>> MRR().compute(predictions=[[7, 3, 5]], references=[[3]])
{'mrr': 0.5}
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import datasets
import evaluate


_INPUTS = """
Args:
    predictions (list of list of int): ids of the retrieved documents of each query, best first.
    references (list of list of int): ids of the relevant documents of each query, at least one.
"""

_CITATION = "Wang et al. Improving Text Embeddings with Large Language Models. 2024."


class RankingMetric(evaluate.Metric, ABC):
    """Mean over the queries of a score of one ranked list; a subclass gives `name_`, `at` and `score`.

    Values lie in [0, 1]. A query without a relevant document is an error, because no score is defined for it.
    """

    name_: str
    at: int | None = None  # documents that count; None for all

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        scores = []
        for query, (ranked, relevant) in enumerate(zip(predictions, references, strict=True)):
            if not len(relevant):
                raise ValueError(f"query {query} has no relevant document")
            scores.append(self.score(list(ranked)[: self.at], set(relevant)))
        return {self.name_: sum(scores) / len(scores)}

    @abstractmethod
    def score(self, ranked: list[int], relevant: set[int]) -> float:
        """Score one query's ranked documents."""


class Accuracy(RankingMetric):
    """Share of queries whose first document is relevant (recall@1 where one document is relevant)."""

    name_, at = "accuracy", 1

    def score(self, ranked: list[int], relevant: set[int]) -> float:
        return float(ranked[0] in relevant)


class MRR(RankingMetric):
    """Mean reciprocal rank of the first relevant document; 0 where none was retrieved."""

    name_ = "mrr"

    def score(self, ranked: list[int], relevant: set[int]) -> float:
        return next((1 / rank for rank, document in enumerate(ranked, start=1) if document in relevant), 0.0)


class NDCG(RankingMetric):
    """nDCG@10 with binary relevance, as trec_eval and BEIR compute it."""

    name_, at = "ndcg_at_10", 10

    def score(self, ranked: list[int], relevant: set[int]) -> float:
        gain = sum(1 / math.log2(rank + 1) for rank, document in enumerate(ranked, start=1) if document in relevant)
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), 10) + 1))
        return gain / ideal
