"""Texts of test sets in the training data (paper, appendix B).

Two texts are the same if they are equal once case and spacing are ignored. As in the paper, equal texts that say
little ("yes", a label, a name) are told apart from the rest: they count as low-entropy overlap, not as contamination.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..records import stable_hash


# Characters without spaces below which an equal text is an accident rather than a leak.
MIN_CHARACTERS = 20
TEXT_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")


def normalize(text: str) -> str:
    """Drop case and all white space, the only differences that the check ignores.

    >>> normalize("The  Quick\\nbrown Fox")
    'thequickbrownfox'
    """
    return "".join(text.casefold().split())


class TestSets:
    """The texts of test sets, kept as one sorted array of 64-bit hashes (10 bytes a text).

    Args:
        texts: (name of the test set, text) pairs; any number of sets, in any order.
        min_characters: texts with fewer characters, spaces not counted, are low-entropy.
    """

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __init__(self, texts: Iterable[tuple[str, str]], min_characters: int = MIN_CHARACTERS):
        self.min_characters = min_characters
        self.names: list[str] = []
        numbers: dict[str, int] = {}
        hashes, owners = array("Q"), array("H")
        for name, text in texts:
            normalized = normalize(text)
            if not normalized:
                continue
            if name not in numbers:
                numbers[name] = len(self.names)
                self.names.append(name)
            hashes.append(stable_hash(normalized))
            owners.append(numbers[name])
        pairs = np.zeros(len(hashes), dtype=[("hash", np.uint64), ("owner", np.uint16)])
        pairs["hash"], pairs["owner"] = hashes, owners
        pairs = np.unique(pairs)
        self._hashes, self._owners = np.ascontiguousarray(pairs["hash"]), np.ascontiguousarray(pairs["owner"])

    @classmethod
    def from_files(cls, paths: Iterable[str | Path], min_characters: int = MIN_CHARACTERS) -> TestSets:
        """Read test sets from files (see `read_texts`); a set is named after its path."""
        pairs = ((str(path), text) for path in find_text_files(paths) for text in read_texts(path))
        return cls(pairs, min_characters)

    def sizes(self) -> dict[str, int]:
        """Return the number of distinct texts of each test set."""
        counts = np.bincount(self._owners, minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def find(self, text: str) -> list[str]:
        """Return the names of the test sets that hold `text`, short texts included; usually none."""
        key = np.uint64(stable_hash(normalize(text)))
        start = int(np.searchsorted(self._hashes, key, side="left"))
        stop = int(np.searchsorted(self._hashes, key, side="right"))
        return [self.names[owner] for owner in self._owners[start:stop]]

    def is_low_entropy(self, text: str) -> bool:
        """Tell whether `text` is too short for an equal text to mean anything."""
        return len(normalize(text)) < self.min_characters


@dataclass
class Overlap:
    """What one test set shares with the training data; counts are of distinct texts."""

    test_texts: int
    contaminated: int = 0
    low_entropy: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class ContaminationReport:
    """Overlap by test set, and the number of training texts that were looked up."""

    training_texts: int
    test_sets: dict[str, Overlap]

    def to_markdown(self) -> str:
        """Return the report as a table, worst test set first, with examples below it."""
        lines = [
            f"{self.training_texts:,} training texts were compared with each test set, case and spacing ignored.",
            "",
            "| test set | texts | contaminated | share | low-entropy overlap |",
            "|---|---:|---:|---:|---:|",
        ]
        worst_first = sorted(self.test_sets.items(), key=lambda item: -item[1].contaminated)
        for name, overlap in worst_first:
            share = overlap.contaminated / max(overlap.test_texts, 1)
            counts = f"{overlap.test_texts:,} | {overlap.contaminated:,} | {share:.2%} | {overlap.low_entropy:,}"
            lines.append(f"| {_cell(name)} | {counts} |")
        for name, overlap in worst_first:
            lines += [""] * bool(overlap.examples)
            lines += [f"- {_cell(name)}: {_cell(e['place'])}: {_cell(e['text'])}" for e in overlap.examples]
        return "\n".join(lines) + "\n"


def check_contamination(
    training_texts: Iterable[tuple[str, str]], test_sets: TestSets, max_examples: int = 5
) -> ContaminationReport:
    """Look up every training text in the test sets.

    Args:
        training_texts: (place, text) pairs; the place, such as `msmarco:17:query`, is shown with examples. A stream
            is read once and not kept.
        max_examples: contaminated texts to show per test set.
    """
    overlaps = {name: Overlap(size) for name, size in test_sets.sizes().items()}
    seen: set[int] = set()
    total = 0
    for place, text in training_texts:
        total += 1
        names = test_sets.find(text)
        if not names:
            continue
        key = stable_hash(normalize(text))
        if key in seen:
            continue
        seen.add(key)
        for name in names:
            overlap = overlaps[name]
            if test_sets.is_low_entropy(text):
                overlap.low_entropy += 1
                continue
            overlap.contaminated += 1
            if len(overlap.examples) < max_examples:
                overlap.examples.append({"place": place, "text": text[:200]})
    return ContaminationReport(total, overlaps)


def read_texts(path: str | Path) -> Iterator[str]:
    """Stream every text of a file: each line of .txt, each string of .jsonl, .json, .csv, .tsv and .parquet.

    Strings inside lists and objects count too.

    Raises:
        InputError: the file cannot be read as what its name says.
    """
    path = Path(path)
    suffix = path.suffix
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from _strings(batch.to_pydict())
        elif suffix in (".csv", ".tsv"):
            import csv

            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","):
                    yield from _strings(row)
        elif suffix == ".json":
            yield from _strings(json.loads(path.read_text(encoding="utf-8")))
        elif suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                for line in file:
                    yield from _strings(json.loads(line))
        else:
            with open(path, encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a {suffix} file of texts ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def find_text_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the files that paths stand for: a file itself, of a folder all files with text in them."""
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES)
            if not found:
                raise InputError(f"{path}: no {', '.join(TEXT_FILES)} files in this folder")
            yield from found
        elif not path.is_file():
            raise InputError(f"{path}: no such file or folder")
        elif path.suffix not in TEXT_FILES:
            raise InputError(f"{path}: a test set is a {', '.join(TEXT_FILES)} file or a folder of them")
        else:
            yield path


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
