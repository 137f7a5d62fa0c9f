"""Which documents of a ranking become hard negatives."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...errors import InputError


@dataclass(frozen=True)
class Selection:
    """Which of the ranked documents become negatives. Scores are cosine similarities; ranks do not count positives."""

    num_negatives: int = field(default=1, metadata={"help": "negatives of a row in the end, its own included"})
    range_min: int = field(default=0, metadata={"help": "ranks to skip"})
    range_max: int = field(default=100, metadata={"help": "last rank to choose from"})
    absolute_margin: float | None = field(
        default=None, metadata={"help": "negatives score at least this much below the row's worst positive"}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "the same as a share: 0.05 is NV-Retriever's 95 % of the positive's score"}
    )
    max_score: float | None = field(default=None, metadata={"help": "negatives score at most this"})
    sampling: Literal["random", "top"] = field(
        default="random", metadata={"help": "draw from the ranks by seed and row, or take the best"}
    )
    replace: bool = field(default=False, metadata={"help": "drop the negatives that rows already have"})
    seed: int = field(default=42, metadata={"help": "of the draw"})

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise InputError(f"num_negatives must be at least 1, found {self.num_negatives}")
        if not 0 <= self.range_min < self.range_max:
            raise InputError(f"the range of ranks is empty: {self.range_min} to {self.range_max}")
        if self.sampling not in ("random", "top"):
            raise InputError(f"sampling must be 'random' or 'top', found {self.sampling!r}")

    def choose(
        self, scores: np.ndarray, ids: np.ndarray, positive_score: float, taken: set[int], kept: int, row: int
    ) -> list[int]:
        """Return the positions of the chosen documents, best first.

        Args:
            scores, ids: [k] the ranking without positives, best first; ids are -1 where it ends.
            positive_score: lowest score of the row's positives.
            taken: documents that the row came with as negatives; they are not found again.
            kept: how many negatives the row keeps.
            row: row number, for the draw.
        """
        limit = np.inf if self.max_score is None else self.max_score
        if self.absolute_margin is not None:
            limit = min(limit, positive_score - self.absolute_margin)
        if self.relative_margin is not None:
            limit = min(limit, positive_score - abs(positive_score) * self.relative_margin)
        candidates = [
            position
            for position in range(self.range_min, min(self.range_max, len(ids)))
            if ids[position] >= 0 and scores[position] <= limit and ids[position] not in taken
        ]
        wanted = max(0, self.num_negatives - kept)
        if self.sampling == "random" and wanted < len(candidates):
            candidates = sorted(random.Random(f"{self.seed}/{row}").sample(candidates, wanted))
        return candidates[:wanted]
