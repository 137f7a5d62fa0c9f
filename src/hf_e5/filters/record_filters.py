"""The filters that look at one record: pure functions from a record to the reason why it is dropped, or None.

They run in the order of `FILTERS`, and the first that objects names the record's fate. Filters that need all records
(duplicates) or a model (negatives that beat the positive) follow in `run.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from ..records import TEXT_COLUMNS, fold, record_problem
from .contamination import TestSets
from .language_id import detect_other_language


Record = dict[str, Any]


@dataclass(frozen=True)
class LengthLimits:
    """Least and most characters of a query and of a document (positive and negative)."""

    query: tuple[int, int] = (1, 20_000)
    document: tuple[int, int] = (1, 20_000)


# Far from what templates ask for: they catch cut-off and run-away answers. A Chinese text has about a third of the
# characters of an English one. Task types of users get the defaults of LengthLimits.
LENGTH_LIMITS = {
    "short_long": LengthLimits(query=(2, 1_000), document=(50, 20_000)),
    "long_short": LengthLimits(query=(5, 20_000), document=(1, 200)),
    "short_short": LengthLimits(query=(2, 1_000), document=(2, 1_000)),
    "long_long": LengthLimits(query=(100, 20_000), document=(100, 20_000)),
    "sts": LengthLimits(query=(3, 5_000), document=(3, 5_000)),
    "bitext": LengthLimits(query=(3, 5_000), document=(2, 5_000)),
}

# A query of this many characters that stands word for word in a document was copied; shorter ones are terms.
MIN_COPIED_CHARACTERS = 40

# Scripts that write words without spaces between them (Thai, Lao, Burmese, Khmer, kana, Chinese), as a regex class.
UNSPACED_SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_UNSPACED = re.compile(f"[{UNSPACED_SCRIPTS}]")
# What a word is made of, as a regex class: \\w leaves out the vowel signs of Indic scripts, Hebrew and Arabic points.
WORD_CHARACTERS = r"\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"


@dataclass(frozen=True)
class FilterSettings:
    """What the filters compare with; the defaults are the ones documented."""

    length_limits: dict[str, LengthLimits] = field(default_factory=lambda: dict(LENGTH_LIMITS))
    test_sets: TestSets | None = None


def schema(record: Record, settings: FilterSettings) -> str | None:
    """Every column is there in its form, with text that is not blank: what `hf-e5 build` takes."""
    return record_problem(record)


def empty(record: Record, settings: FilterSettings) -> str | None:
    """No instruction and no text without a letter or digit."""
    for name, text in [("instruction", record["instruction"]), *_texts(record)]:
        if not any(map(str.isalnum, text)):
            return f"{name} is empty"
    return None


def length(record: Record, settings: FilterSettings) -> str | None:
    """Query and documents within the limits of the task type."""
    limits = settings.length_limits.get(record["task_type"], LengthLimits())
    for name, text in _texts(record):
        low, high = limits.query if name == "query" else limits.document
        count = len(text.strip())
        if not low <= count <= high:
            return f"{name} has {count} characters, wanted {low} to {high}"
    return None


def copied_query(record: Record, settings: FilterSettings) -> str | None:
    """No document that is the query, and none that holds a long query word for word."""
    query = fold(record["query"])
    for name in ("positive", "negative"):
        document = fold(record.get(name) or "")
        if document == query:
            return f"{name} is the query"
        if len(query) >= MIN_COPIED_CHARACTERS and query in document:
            return f"{name} holds the query word for word"
    return None


def positive_equals_negative(record: Record, settings: FilterSettings) -> str | None:
    """A hard negative that differs from the positive in more than case and spacing."""
    if fold(record["positive"]) == fold(record.get("negative") or ""):
        return "positive and negative are the same text"
    return None


def label_in_text(record: Record, settings: FilterSettings) -> str | None:
    """No long_short text that names its own label: the task would be a word search (paper, table 9)."""
    if record["task_type"] != "long_short":
        return None
    text, label = fold(record["query"]), fold(record["positive"])
    whole_word = rf"(?<![{WORD_CHARACTERS}]){re.escape(label)}(?![{WORD_CHARACTERS}])"
    if label in text and (_UNSPACED.search(label) or re.search(whole_word, text)):
        return f"the text contains its label {record['positive']!r}"
    return None


def wrong_language(record: Record, settings: FilterSettings) -> str | None:
    """Query in `language`, documents in `document_language`, as far as language identification can tell."""
    for name, text in _texts(record):
        language = record["language" if name == "query" else "document_language"]
        found = detect_other_language(text, language)
        if found:
            return f"{name} looks like {found[0]!r}, not {language!r} (probability {found[1]:.4f})"
    return None


def meta_talk(record: Record, settings: FilterSettings) -> str | None:
    """No text in which the model talks about its answer (resources/meta_talk.txt)."""
    for name, text in _texts(record):
        lowered = text.lower()
        for phrase, pattern in _meta_phrases():
            if phrase in lowered and (pattern is None or pattern.search(lowered)):
                return f"{name} has the phrase {phrase!r}"
    return None


def contamination(record: Record, settings: FilterSettings) -> str | None:
    """No text of a given test set, short texts aside (paper, appendix B)."""
    if settings.test_sets is None:
        return None
    for name, text in _texts(record):
        if not settings.test_sets.is_low_entropy(text) and (found := settings.test_sets.find(text)):
            return f"{name} is a text of {found[0]}"
    return None


FILTERS: dict[str, Callable[[Record, FilterSettings], str | None]] = {
    function.__name__: function
    for function in (
        schema,
        empty,
        length,
        copied_query,
        positive_equals_negative,
        label_in_text,
        meta_talk,
        contamination,
        wrong_language,
    )
}


def judge(record: Record, settings: FilterSettings, skip: frozenset[str] = frozenset()) -> tuple[str, str] | None:
    """Return (filter, reason) of the first filter that drops the record, or None if it is kept."""
    for name, function in FILTERS.items():
        if name not in skip:
            reason = function(record, settings)
            if reason:
                return name, reason
    return None


def _texts(record: Record) -> list[tuple[str, str]]:
    """The record's texts as (column, text); a negative may be absent."""
    return [(name, record[name]) for name in TEXT_COLUMNS if record.get(name) is not None]


@cache
def _meta_phrases() -> list[tuple[str, re.Pattern[str] | None]]:
    """Return (phrase, pattern): the plain phrase is a hundred times cheaper to look for, so it goes first."""
    lines = (files(__package__) / "resources" / "meta_talk.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.partition("\t") for line in lines if line and not line.startswith("#")]
    return [(phrase, re.compile(pattern) if pattern else None) for phrase, _, pattern in rows]
