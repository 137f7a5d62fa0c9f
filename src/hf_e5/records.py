"""The record, one JSON object a line: columns, the files of a run's folder and their readers, text equality, usage."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

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
TEXT_COLUMNS = ("query", "positive", "negative")
# One instruction serves all examples of these types (paper, table 16).
SYMMETRIC_TASK_TYPES = ("sts", "bitext")

_LANGUAGE = (r"[a-z]{2,3}(-[A-Za-z0-9]+)*", "an ISO 639 code such as 'en'")
_FORMS = {
    "task_type": (r"[a-z][a-z0-9_]*", "lower-case letters, digits and _, such as 'short_long'"),
    "language": _LANGUAGE,
    "document_language": _LANGUAGE,
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


def parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """Return the JSON object of a line and None; of another line {"line": its text} and what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        problem = f"not valid JSON ({error})"
    else:
        if isinstance(row, dict):
            return row, None
        problem = f"expected a JSON object, got {type(row).__name__}"
    return {"line": line.decode(errors="replace").rstrip("\n")}, problem


def _lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Stream the lines that are not blank as (place, line); the place is `file:row` with rows from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def read_any_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Stream the rows of a JSONL file; a line that is no JSON object comes as {"line": its text}."""
    return (parse_line(line)[0] for _, line in _lines(path))


def read_rows(path: str | Path, *, torn_end: bool = False) -> Iterator[dict[str, Any]]:
    """Stream the rows of a JSONL file, one in memory at a time.

    Args:
        torn_end: pass over a last line that a crash cut.

    Raises:
        InputError: a line is no JSON object; names file and line.
    """
    for place, line in _lines(path):
        row, problem = parse_line(line)
        if problem and not (torn_end and not line.endswith(b"\n")):
            raise InputError(f"{place}: {problem}; repair or delete this row")
        if not problem:
            yield row


def read_records(path: str | Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Stream the records of one file as (place, line, record); the place is `file:row` with rows from 1.

    Raises:
        InputError: a row that is no record, with its place and the field that is wrong.
    """
    for place, line in _lines(path):
        record, problem = parse_line(line)
        if problem := problem or record_problem(record):
            raise InputError(f"{place}: {problem}")
        yield place, line, record


def read_json(path: str | Path) -> dict[str, Any]:
    """Return what a JSON file of a run's folder holds; `InputError` if it is no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def record_problem(record: dict[str, Any]) -> str | None:
    """Say which field of a row is wrong and how, as `field: problem`; None if the row is a record."""
    problems = ((field, _problem(field, record.get(field))) for field in RECORD_COLUMNS)
    return next((f"{field}: {problem}" for field, problem in problems if problem), None)


def _problem(field: str, value: Any) -> str | None:
    if value is None:
        return None if field == "negative" else "missing or null"
    if field == "placeholders":
        if not isinstance(value, dict) or not all(isinstance(drawn, (str, int, float)) for drawn in value.values()):
            return "expected an object whose values are strings or numbers"
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return f"expected a string, got {type(value).__name__}"
    if not value.strip():
        return "empty"
    if field in _FORMS:
        form, wanted = _FORMS[field]
        if not re.fullmatch(form, value) or value == "all":  # the config that holds every task type
            return f"expected {wanted}, got {value!r}"
    try:
        value.encode()
    except UnicodeEncodeError:  # parquet cannot hold it
        return "holds half of a surrogate pair, which is no character"
    return None


def stable_hash(text: str | bytes) -> int:
    """Hash a text to 64 bits, the same on every machine and in every process."""
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def fold(text: str) -> str:
    """Return the text as it is compared: case and spacing do not count."""
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """Hash a text to 64 bits so that case and spacing do not count."""
    return stable_hash(fold(text))


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
    key = text_key(record["query"] if by_row else record["instruction"])
    return "test" if key < test_size * 2**64 else "train"


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
