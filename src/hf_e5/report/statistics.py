"""What a report says about records: counts, lengths, diversity, and what they cost. One pass, bounded memory."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..filters.duplicates import text_key
from ..filters.record_filters import TEXT_FIELDS, UNSPACED_SCRIPTS, WORD_CHARACTERS, FilterSettings, schema
from ..synthesis.usage import Usage


# Distinct-n falls as texts are added, so it is taken on samples of one size, of which results can be compared.
DIVERSITY_RECORDS = 5_000
_TOKEN = re.compile(rf"[{UNSPACED_SCRIPTS}]|(?:(?![{UNSPACED_SCRIPTS}])[{WORD_CHARACTERS}])+")


class Sample:
    """A uniform sample of a stream whose length is unknown (reservoir sampling), in the order of the stream."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen = size, 0
        self._random = random.Random(seed)
        self._rows: list[tuple[int, Any]] = []

    def add(self, row: Any) -> None:
        self.seen += 1
        if len(self._rows) < self.size:
            self._rows.append((self.seen, row))
            return
        place = self._random.randrange(self.seen)
        if place < self.size:
            self._rows[place] = (self.seen, row)

    def rows(self) -> list[Any]:
        return [row for _, row in sorted(self._rows, key=lambda pair: pair[0])]


@dataclass
class Statistics:
    """Counts over records; `add` takes one after the other."""

    records: int = 0
    unreadable: int = 0
    task_types: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    document_languages: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    characters: dict[tuple[str, str], array] = field(default_factory=dict)
    instructions: set[bytes] = field(default_factory=set)
    sample: Sample = field(default_factory=lambda: Sample(DIVERSITY_RECORDS))

    def add(self, record: dict[str, Any]) -> bool:
        """Count a record; return False, and count it as unreadable, if it is none."""
        if schema(record, FilterSettings()):
            self.unreadable += 1
            return False
        self.records += 1
        task_type = record["task_type"]
        self.task_types[task_type] += 1
        self.languages[record["language"]] += 1
        self.document_languages[record["document_language"]] += 1
        self.models[record["model"]] += 1
        self.instructions.add(text_key(record["instruction"])[:8])
        for name in TEXT_FIELDS:
            if record.get(name):
                self.characters.setdefault((task_type, name), array("I")).append(len(record[name]))
        self.sample.add((record["query"], record["positive"]))
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as plain JSON data, largest counts first."""
        return {
            "records": self.records,
            "unreadable": self.unreadable,
            "task_types": dict(self.task_types.most_common()),
            "languages": dict(self.languages.most_common()),
            "document_languages": dict(self.document_languages.most_common()),
            "models": dict(self.models.most_common()),
            "characters": self._lengths(),
            "distinct_instructions": len(self.instructions),
            "diversity": distinct_ngrams(self.sample.rows()),
        }

    def _lengths(self) -> dict[str, dict[str, dict[str, float]]]:
        lengths: dict[str, dict[str, dict[str, float]]] = {name: {} for name, _ in self.task_types.most_common()}
        for (task_type, name), counts in self.characters.items():
            low, median, high = np.percentile(counts, [5, 50, 95]).tolist()
            mean = float(np.mean(counts))
            lengths[task_type][name] = {"p5": low, "median": median, "mean": round(mean, 1), "p95": high}
        return lengths


def distinct_ngrams(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return distinct-1 to distinct-3 of queries and of positives: different n-grams over all n-grams, 0 to 1.

    Tokens are words, and single characters in scripts that do not space words. 1 means that nothing is ever repeated.
    """
    result: dict[str, float] = {}
    pairs = list(pairs)
    result["records"] = len(pairs)
    for side, name in enumerate(("query", "positive")):
        tokens = [_TOKEN.findall(pair[side].casefold()) for pair in pairs]
        for n in (1, 2, 3):
            grams = Counter(gram for words in tokens for gram in zip(*(words[i:] for i in range(n)), strict=False))
            result[f"{name}_distinct_{n}"] = round(len(grams) / max(grams.total(), 1), 4)
    return result


def read_usage(path: Path, records: int) -> dict[str, Any] | None:
    """Sum up tokens and cost of `answers.jsonl` by model (`usage.Usage`); None without such a file.

    Failed answers and brainstormed task lists were paid for and count. A cost is None where a model has no price.

    Args:
        records: number of records to divide by.
    """
    if not path.is_file():
        return None
    usage = Usage()
    usage.add_file(path)
    models = usage.models.values()
    costs = [model.cost for model in models]
    return {
        "models": {name: asdict(model) for name, model in usage.models.items()},
        "answers": sum(model.answers for model in models),
        "errors": dict(usage.errors.most_common()),
        "tokens_per_record": sum(model.prompt_tokens + model.completion_tokens for model in models) / records,
        "usd_per_1k_records": None if None in costs else 1000 * sum(filter(None, costs)) / records,
    }


def read_margins(path: Path) -> dict[str, float] | None:
    """Return percentiles of the margins in `margins.tsv`; None without such a file."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        margins = array("f", (float(line.rsplit("\t", 1)[1]) for line in list(file)[1:]))
    if not margins:
        return None
    points = np.percentile(margins, [1, 5, 25, 50, 75, 95]).tolist()
    names = ("1 %", "5 %", "25 %", "median", "75 %", "95 %")
    return {"records": len(margins), **{name: round(point, 4) for name, point in zip(names, points, strict=True)}}
