"""Records: the rows that synthesis writes and datasets are built from, one JSON object a line."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError


# The files of a run's folder.
ANSWERS_FILE = "answers.jsonl"
RECORDS_FILE = "records.jsonl"
FAILURES_FILE = "failures.jsonl"
RUN_FILE = "run.json"
KEPT_FILE = "kept.jsonl"
DROPPED_FILE = "dropped.jsonl"
FILTERS_FILE = "filters.json"
MARGINS_FILE = "margins.tsv"

# In the order of the dataset's columns; all but `negative` must be there.
RECORD_COLUMNS = (
    "id",
    "task_type",
    "language",
    "document_language",
    "instruction",
    "query",
    "positive",
    "negative",
    "placeholders",
    "model",
)
OPTIONAL_FIELDS = {"negative"}
# One instruction serves all examples of these types (paper, table 16).
SYMMETRIC_TASK_TYPES = ("sts", "bitext")

_TASK_TYPE = re.compile(r"[a-z][a-z0-9_]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_FORMS = {
    "task_type": (_TASK_TYPE, "lower-case letters, digits and _, such as 'short_long'"),
    "language": (_LANGUAGE, "an ISO 639 code such as 'en'"),
    "document_language": (_LANGUAGE, "an ISO 639 code such as 'en'"),
}


def find_record_files(sources: Iterable[str | Path]) -> list[Path]:
    """Return the record files that `sources` stand for.

    A source is a JSONL file, or the folder of a synthesis run, which stands for its `kept.jsonl` where the filters
    ran and for its `records.jsonl` where they did not.

    Raises:
        InputError: a source does not exist, or a folder has no records.
    """
    files = []
    for source in map(Path, sources):
        if source.is_file():
            files.append(source)
        elif source.is_dir():
            found = [source / name for name in (KEPT_FILE, RECORDS_FILE) if (source / name).is_file()]
            if not found:
                raise InputError(f"{source}: no records.jsonl in this folder")
            files.append(found[0])
        else:
            raise InputError(f"{source}: no such file or folder")
    return files


def read_records(path: str | Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Stream the records of one file as (place, line, record); the place is `file:row` with rows from 1.

    Raises:
        InputError: a row that is no record, with its place and the field that is wrong.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, line, _parse(line, place)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON ({error}); repair or delete this row") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(record).__name__}")
    for field in RECORD_COLUMNS:
        problem = _problem(field, record.get(field))
        if problem:
            raise InputError(f"{place}: {field}: {problem}")
    # Only an escape can bring half a surrogate pair into a str, and parquet cannot hold it.
    if b"\\ud" in line.lower():
        _check_encodable(record, place)
    return record


def _problem(field: str, value: Any) -> str | None:
    """Say what is wrong with the value of a field; None if nothing is."""
    if value is None:
        return None if field in OPTIONAL_FIELDS else "missing or null"
    if field == "placeholders":
        if not isinstance(value, dict) or not all(isinstance(drawn, (str, int, float)) for drawn in value.values()):
            return "expected an object whose values are strings or numbers"
        return None
    if not isinstance(value, str):
        return f"expected a string, got {type(value).__name__}"
    if not value.strip():
        return "empty"
    if field in _FORMS:
        form, wanted = _FORMS[field]
        if not form.fullmatch(value) or value == "all":
            return f"expected {wanted}, got {value!r}"
    return None


def _check_encodable(record: dict[str, Any], place: str) -> None:
    for field in RECORD_COLUMNS:
        value = record.get(field)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{place}: {field}: holds half of a surrogate pair, which is no character") from None


def stable_hash(text: str) -> int:
    """Hash a text to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def folded(text: str) -> str:
    """Return the text as it is compared: case and spacing do not count."""
    return " ".join(text.casefold().split())


def check_test_size(test_size: float) -> None:
    """Raise `InputError` unless `test_size` is a share that leaves something to train on."""
    if not 0 <= test_size < 1:
        raise InputError(f"test_size: expected at least 0 and less than 1, got {test_size}")


def split_of(record: dict[str, Any], test_size: float) -> str:
    """Return `train` or `test` for a record: a pure function of its text, whatever stands around it.

    All records of one instruction fall on the same side, so that the test split has unseen tasks. `sts` and `bitext`
    have one instruction each and are split by the query.
    """
    by_row = record["task_type"] in SYMMETRIC_TASK_TYPES
    key = folded(record["query"] if by_row else record["instruction"])
    return "test" if stable_hash(key) < test_size * 2**64 else "train"


class RecordCounts:
    """What a set of records holds, counted one record at a time.

    Memory is 16 bytes a record: two hashes, by which ids that occur twice are found and instructions are counted.

    Attributes:
        task_types, models: number of records by task type and by model.
        languages: number of records by language of the query.
        document_languages: the same for the documents.
        negatives: number of records with a hard negative, by task type.
        characters: sum of the lengths by (task type, field).
    """

    def __init__(self) -> None:
        self.task_types: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.document_languages: Counter[str] = Counter()
        self.negatives: Counter[str] = Counter()
        self.characters: Counter[tuple[str, str]] = Counter()
        self._ids = array("Q")
        self._instructions = array("Q")

    def add(self, record: dict[str, Any]) -> None:
        task_type = record["task_type"]
        self.task_types[task_type] += 1
        self.models[record["model"]] += 1
        self.languages[record["language"]] += 1
        self.document_languages[record["document_language"]] += 1
        self.negatives[task_type] += record.get("negative") is not None
        for field in ("query", "positive", "negative"):
            self.characters[task_type, field] += len(record.get(field) or "")
        self._ids.append(stable_hash(record["id"]))
        self._instructions.append(stable_hash(folded(record["instruction"])))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_instructions(self) -> int:
        """Number of distinct instructions."""
        return len(np.unique(np.frombuffer(self._instructions, dtype=np.uint64)))

    def first_repeated_id(self) -> tuple[int, int] | None:
        """Return the positions, in the order of adding, of the first record whose id was there before, and of that."""
        hashes = np.frombuffer(self._ids, dtype=np.uint64)
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        repeated = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
        return (int(first[inverse][repeated[0]]), int(repeated[0])) if len(repeated) else None
