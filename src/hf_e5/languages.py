"""The 93 languages of the paper and how often each is drawn (section 1 and figure 2).

The list is XLM-R's without romanised variants and Zawgyi, with the two Chinese scripts as one. Figure 2 names 14
languages; the other 79 share what is left ("Others", 19.8 %) equally.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Language:
    """A language: ISO 639 code, English name and share of the examples (0 to 1)."""

    code: str
    name: str
    share: float


@cache
def load_languages() -> dict[str, Language]:
    """Return all languages by ISO code; their shares sum to 1."""
    text = files("hf_e5").joinpath("languages.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    named = sum(float(row["share"]) for row in rows if row["share"])
    tail = (100 - named) / sum(not row["share"] for row in rows)
    return {
        row["code"]: Language(row["code"], row["name"], (float(row["share"]) if row["share"] else tail) / 100)
        for row in rows
    }


def language_name(code: str) -> str:
    """Return the English name of an ISO code.

    Raises:
        KeyError: the code is not one of the 93.
    """
    return load_languages()[code].name
