"""Mixtures: several datasets, each in its own columns, read as one training set.

A mixture is a YAML file (`docs/data_mixtures.md`); a single file, built folder or Hub id is a mixture of one.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset

from ..errors import InputError
from ..records import RECORD_COLUMNS
from .mixture_config import ROLES, Source, read_mixture


FEATURES = Features(
    {
        "instruction": Value("string"),
        "query": Value("string"),
        "positive": Value("string"),
        "negative": List(Value("string")),
        "dataset": Value("string"),
        "task_type": Value("string"),
    }
)
# Columns that hf-e5 itself writes. Without a mapping any other column is an error: roles go by name, and a misspelt
# `negatives` must not silently train without negatives.
KNOWN_COLUMNS = {*FEATURES, *RECORD_COLUMNS, "negative_scores", "positive_score"}

# Changes whenever `_rows_to_columns` gives other rows: `datasets` caches by arguments and does not see our code.
_CACHE_VERSION = 1
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


def load_mixture(
    source: str | Path | Mapping,
    *,
    config: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load training or evaluation data: a mixture file, or a single file, built folder or Hub id.

    Everything random depends on the seed and the row number alone. Results are cached by `datasets` and memory-mapped;
    with several processes let the first one load first (`TrainingArguments.main_process_first`).

    Args:
        source: path of a mixture's YAML (or its content as a dict), a data file, a folder, or a Hub id.
        config: configuration of a single folder or Hub id, such as `sts`.
        split: split of every dataset that does not name its own. A single file has no splits and is taken whole.
        max_rows: most rows of a single dataset.
        num_proc: processes that convert rows.
        cache_dir: for Arrow files; the Hugging Face cache by default.

    Returns:
        A map-style dataset with the columns `instruction` (text or None), `query`, `positive`, `negative` (list of
        texts, possibly empty), `dataset` (name) and `task_type` (text or None), dataset after dataset, unshuffled.

    Raises:
        InputError: something cannot be loaded, or a row has no query or positive; names dataset, row and field.
    """
    sources, seed = read_mixture(source, config=config, max_rows=max_rows)
    return concatenate_datasets(
        [load_source(entry, split=split, seed=seed, num_proc=num_proc, cache_dir=cache_dir) for entry in sources]
    )


def load_source(
    source: Source,
    *,
    split: str,
    seed: int,
    whole: bool = False,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load one dataset of a mixture, as `load_mixture` does.

    Args:
        whole: keep all positives and negatives of a row; `positive` is then a list, unless the dataset has one plain
            column of positives.
    """
    dataset, rows = open_source(source, split=split, seed=seed, cache_dir=cache_dir)
    features = FEATURES.copy()
    positive = _role_columns(source, dataset.column_names)["positive"]
    if whole and (len(positive) > 1 or not isinstance(dataset.features.get(positive[0]), Value)):
        features["positive"] = FEATURES["negative"]
    several = features["positive"] == FEATURES["negative"]
    options = {"source": source, "rows": rows, "seed": seed, "whole": whole, "several": several}
    return dataset.map(
        _rows_to_columns,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        fn_kwargs={**options, "version": _CACHE_VERSION},
        num_proc=num_proc,
        desc=f"Reading {source.name}",
    )


def open_source(
    source: Source, *, split: str, seed: int, cache_dir: str | Path | None = None
) -> tuple[Dataset, np.ndarray]:
    """Load one dataset, sampled, with only the columns that its roles need.

    Returns:
        The sampled rows, and their row numbers in the dataset (`int64`).
    """
    dataset = load_raw(source, source.split or split, cache_dir)
    specs = [spec for role in _role_columns(source, dataset.column_names).values() for spec in role]
    dataset = dataset.select_columns(
        sorted({path[0] for spec in specs for path in _paths(spec, dataset.column_names)})
    )
    keep = len(dataset)
    if source.ratio is not None:
        keep = max(1, round(source.ratio * keep))
    if source.max_rows is not None:
        keep = min(source.max_rows, keep)
    if not keep or not len(dataset):
        raise InputError(f"dataset {source.name!r}: split {source.split or split!r} has no rows")
    # The name is part of the seed, so that datasets of equal size do not lose the same rows.
    rng = np.random.default_rng((seed, zlib.crc32(source.name.encode())))
    rows = np.arange(len(dataset))
    if keep < len(dataset):
        rows = np.sort(rng.permutation(len(dataset))[:keep])
        dataset = dataset.select(rows)
    return dataset, rows


class RowError(NamedTuple):
    """Why a row cannot be trained on; `is_empty` where a text is missing and nothing else is wrong."""

    role: str
    message: str
    is_empty: bool = False


class Row(NamedTuple):
    """What a dataset's row holds in each role, before any check: texts, unless the data is wrong."""

    instruction: Any
    query: Any
    positives: list
    negatives: list
    task_type: Any

    def error(self) -> RowError | None:
        """Why the row cannot be trained on."""
        singles = (("query", self.query), ("instruction", self.instruction), ("task_type", self.task_type))
        several = [("positive", text) for text in self.positives] + [("negative", text) for text in self.negatives]
        for role, value in (*singles, *several):
            if value is not None and not isinstance(value, str):
                return RowError(role, f"expected text, found {type(value).__name__} {str(value)[:40]!r}")
        empty = "query" if not (self.query or "").strip() else "positive" if not self.positives else None
        return RowError(empty, "no text", is_empty=True) if empty else None


def read_rows(batch: Mapping[str, list], source: Source) -> Iterator[Row]:
    """Read the roles of a batch of raw rows (column -> values). Empty positives and negatives are left out."""
    columns = _role_columns(source, list(batch))
    size = len(next(iter(batch.values())))
    values = {role: _read_column(batch, columns[role], size) for role in columns}
    missing = [None] * size
    instruction, query, positive, negative, task_type = (values.get(role, missing) for role in ROLES)
    for i in range(size):
        yield Row(instruction[i], query[i], _texts(positive[i]), _texts(negative[i]), task_type[i])


def _rows_to_columns(
    batch: Mapping[str, list],
    positions: list[int],
    source: Source,
    rows: np.ndarray,
    seed: int,
    whole: bool,
    several: bool,
    version: int,
) -> dict[str, list]:
    read = []
    for number, row in zip(rows[positions].tolist(), read_rows(batch, source), strict=True):
        if error := row.error():
            if source.drop_empty and error.is_empty:
                continue
            hint = "; fix it or set 'drop_empty: true'" if error.is_empty else ""
            raise InputError(f"dataset {source.name!r}, row {number}, field {error.role!r}: {error.message}{hint}")
        query, positive, negatives = row.query, row.positives if several else row.positives[0], row.negatives
        if not whole:
            query, positive, negatives = _draw(row, source, random.Random(f"{seed}/{source.name}/{number}"))
        instructions = source.instruction or (row.instruction or None,)
        instruction = instructions[number % len(instructions)]
        read.append((instruction, query, positive, negatives, source.name, row.task_type))
    return {name: [values[i] for values in read] for i, name in enumerate(FEATURES)}


def _draw(row: Row, source: Source, rng: random.Random) -> tuple[str, str, list[str]]:
    """What training reads of a row: query, one positive, and as many negatives as the source asks for."""
    positive, negatives = row.positives[0], row.negatives
    if len(row.positives) > 1:
        positive = rng.choice(row.positives)
    if source.num_negatives is not None and source.num_negatives < len(negatives):
        if source.negatives == "random":
            negatives = rng.sample(negatives, len(negatives))
        negatives = negatives[: source.num_negatives]
    if source.symmetric and rng.random() < 0.5:
        return positive, row.query, []
    return row.query, positive, negatives


def load_raw(source: Source, split: str, cache_dir: str | Path | None = None) -> Dataset:
    """Load the rows of a source as they are, in their own columns.

    Raises:
        InputError: they cannot be loaded.
    """
    path = source.path
    kwargs: dict[str, Any] = {"split": split, "cache_dir": None if cache_dir is None else str(cache_dir)}
    suffixes = [suffix for suffix in Path(path).suffixes if suffix in _FORMATS]
    if suffixes and (path.startswith("hf://") or Path(path).suffix):
        if source.config is not None:
            raise InputError(f"dataset {source.name!r}: {path} is a file and has no config {source.config!r}")
        if not path.startswith("hf://") and "*" not in path:
            if not Path(path).is_file():
                raise InputError(f"dataset {source.name!r}: no such file: {Path(path).absolute()}")
            if not Path(path).stat().st_size:
                raise InputError(f"dataset {source.name!r}: {path} is empty")
        kwargs |= {"path": _FORMATS[suffixes[-1]], "data_files": {split: path}}
        if suffixes[-1] == ".tsv":
            kwargs["sep"] = "\t"
    elif Path(path).is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        kwargs |= {"path": path, "name": source.config, "revision": source.revision}
    else:
        where = Path(path).absolute()
        raise InputError(f"dataset {source.name!r}: {where} is neither a data file, a folder nor a Hub id")
    try:
        return load_dataset(**kwargs)
    except Exception as error:  # loaders, file systems and HTTP clients share no base class; the cause stays chained
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = _first_bad_line(path) or (lines or [type(error).__name__])[0]
        raise InputError(f"dataset {source.name!r}: cannot load {path}, split {split!r}: {reason}") from error


def _first_bad_line(path: str) -> str | None:
    """Which line of a JSONL file is not JSON; the loader names a row of its current block only."""
    if path.endswith(".jsonl") and Path(path).is_file():
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line or "null")
                except ValueError as error:
                    return f"line {number} is not JSON ({error})"
    return None


def _role_columns(source: Source, names: list[str]) -> dict[str, list[str]]:
    """Return the columns of each role that the dataset has."""
    columns = {role: [c] if isinstance(c, str) else list(c) for role, c in source.columns.items()}
    if not columns:
        if unknown := [name for name in names if name not in KNOWN_COLUMNS]:
            raise InputError(
                f"dataset {source.name!r}: unknown column {unknown[0]!r} (of {', '.join(names)}); rename it, or "
                "name the columns of the roles under 'columns:' in a mixture file"
            )
        columns = {role: [role] for role in ROLES if role in names}
        if source.instruction:
            columns.pop("instruction", None)
    for role in ("query", "positive"):
        if role not in columns:
            raise InputError(f"dataset {source.name!r}: no column {role!r} (it has {', '.join(names)})")
    for role, specs in columns.items():
        for root, *_ in (path for spec in specs for path in _paths(spec, names)):
            if root not in names:
                raise InputError(
                    f"dataset {source.name!r}: no column {root!r} for {role!r}; it has {', '.join(names)}"
                )
    return columns


def _paths(spec: str, names: Container[str]) -> list[list[str]]:
    """Where `a.b + c` is: `[["a", "b"], ["c"]]`. A column's own name may have dots."""
    return [[part] if part in names else part.split(".") for part in map(str.strip, spec.split("+"))]


def _read_column(batch: Mapping[str, list], specs: list[str], size: int) -> list:
    """The value of a role in every row: of one column, or the list of the values of several."""
    values = []
    for spec in specs:
        parts = [[_descend(value, path) for value in batch[root]] for root, *path in _paths(spec, batch)]
        values.append(parts[0] if len(parts) == 1 else [_join(row) for row in zip(*parts, strict=True)])
    return values[0] if len(values) == 1 else [list(row) for row in zip(*values, strict=True)]


def _descend(value: Any, path: list[str]) -> Any:
    if isinstance(value, list):
        return [_descend(item, path) for item in value]
    if not path or value is None:
        return value
    return _descend(value.get(path[0]), path[1:]) if isinstance(value, dict) else value


def _join(values: tuple) -> Any:
    if any(isinstance(value, list) for value in values):
        return [_join(row) for row in zip(*values, strict=True)]
    return " ".join(value for value in values if value)


def _texts(value: Any) -> list:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if item is not None and (not isinstance(item, str) or item.strip())]
