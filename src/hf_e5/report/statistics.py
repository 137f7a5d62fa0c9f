"""What a report says about records: counts, lengths, diversity, and what they cost. One pass, bounded memory."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..filters.record_filters import UNSPACED_SCRIPTS, WORD_CHARACTERS
from ..records import TEXT_COLUMNS, Usage, stable_hash, text_key


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


class Statistics:
    """What a set of records holds, counted one record at a time; about 30 bytes a record.

    Attributes:
        task_types, models: number of records by task type and by model.
        languages: number of records by language of the query.
        document_languages: the same for the documents.
        characters: lengths of the texts by (task type, column), without those that are absent.
    """

    def __init__(self) -> None:
        self.task_types: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.document_languages: Counter[str] = Counter()
        self.characters: dict[tuple[str, str], array] = defaultdict(lambda: array("I"))
        self._ids, self._instructions = array("Q"), array("Q")
        self._sample = Sample(DIVERSITY_RECORDS)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, record: dict[str, Any]) -> None:
        self.task_types[record["task_type"]] += 1
        self.models[record["model"]] += 1
        self.languages[record["language"]] += 1
        self.document_languages[record["document_language"]] += 1
        for name in TEXT_COLUMNS:
            if record.get(name) is not None:
                self.characters[record["task_type"], name].append(len(record[name]))
        self._ids.append(stable_hash(record["id"]))
        self._instructions.append(text_key(record["instruction"]))
        self._sample.add((record["query"], record["positive"]))

    @property
    def num_instructions(self) -> int:
        """Number of distinct instructions; case and spacing do not count."""
        return len(set(self._instructions))

    def first_repeated_id(self) -> tuple[int, int] | None:
        """Return the positions, in the order of adding, of the first record whose id was there before, and of that."""
        hashes = np.frombuffer(self._ids, dtype=np.uint64)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
        return (int(first[inverse][repeated[0]]), int(repeated[0])) if len(repeated) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as plain JSON data, largest counts first."""
        return {
            "records": len(self),
            "task_types": dict(self.task_types.most_common()),
            "languages": dict(self.languages.most_common()),
            "document_languages": dict(self.document_languages.most_common()),
            "models": dict(self.models.most_common()),
            "characters": self._lengths(),
            "distinct_instructions": self.num_instructions,
            "diversity": distinct_ngrams(self._sample.rows()),
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
    """Sum up tokens and cost of `answers.jsonl` by model (`records.Usage`); None without such a file.

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
