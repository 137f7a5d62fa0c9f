"""What a run was charged for: the answers of `answers.jsonl` (see `store.py`), summed by model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .store import read_rows


@dataclass
class ModelUsage:
    """Answers of one model (failed ones too), tokens as its server counted them, and USD.

    `cost` is None if an answer that took tokens has no price.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0


@dataclass
class Usage:
    """Sums over the answers of one or several runs.

    Attributes:
        models: by model, in the order of their first answers.
        errors: failed answers by kind, such as `json` or `http 503`.
    """

    models: dict[str, ModelUsage] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def add_file(self, path: str | Path) -> None:
        """Add the answers of one `answers.jsonl`; a torn last line counts as not written.

        Raises:
            InputError: another line is no JSON object; names file and line.
        """
        for answer in read_rows(path, torn_end=True):
            usage = self.models.setdefault(str(answer.get("model")), ModelUsage())
            prompt_tokens, completion_tokens = answer.get("prompt_tokens") or 0, answer.get("completion_tokens") or 0
            usage.answers += 1
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens
            if answer.get("error"):
                self.errors[str(answer["error"]).partition(":")[0]] += 1
            if prompt_tokens + completion_tokens and usage.cost is not None:
                cost = answer.get("cost")
                usage.cost = None if cost is None else usage.cost + cost
