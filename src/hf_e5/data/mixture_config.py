"""What a mixture file says: which datasets, which columns, how much of each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..config import beside, read_yaml
from ..errors import InputError


ROLES = ("instruction", "query", "positive", "negative", "task_type")
DEFAULT_SEED = 42


# What the value of a key must be.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("name", "config", "split", "revision"), (lambda value: value is None or isinstance(value, str), "text")
    ),
    **dict.fromkeys(("symmetric", "drop_empty"), (lambda value: isinstance(value, bool), "true or false")),
    "ratio": (lambda value: type(value) in (int, float) and 0 < value <= 1, "above 0 and at most 1"),
    "max_rows": (lambda value: type(value) is int and value >= 1, "a whole number >= 1"),
    "num_negatives": (lambda value: type(value) is int and value >= 0, "a whole number >= 0"),
    "negatives": (lambda value: value in ("first", "random"), "'first' or 'random'"),
    "instruction": (lambda value: bool(value) and _are_texts(value), "text or a list of texts"),
    "columns": (lambda value: isinstance(value, Mapping), "a mapping of role to column"),
}


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Args:
        path: local file (jsonl, json, parquet, csv), folder, Hub id, or `hf://datasets/user/name/file.parquet`. `*` in
            a file's name takes several files. In a mixture file it is relative to that file.
        name: what the `dataset` column and every message say.
        config: name of the dataset's configuration.
        split: defaults to the split asked of `load_mixture`.
        revision: branch, tag or commit on the Hub.
        columns: role -> column. `a.b` reads inside a struct or a list of structs; `a + b` joins two columns with a
            space (title and text). A list of columns gives several negatives or positives. By default roles are found
            by their own names, and unknown columns are an error.
        instruction: one, or several that alternate by row number. Replaces an `instruction` column.
        ratio: share of the rows to use, above 0 and up to 1.
        max_rows: most rows to use.
        num_negatives: negatives kept per row; all by default, 0 for none.
        negatives: which of them: the `first` or `random` ones.
        symmetric: half of the rows (drawn by row) run from positive to query. Those lose their negatives, which were
            chosen for the query. The paper trains in one direction only (section 3.2).
        drop_empty: leave rows without query or positive out instead of refusing them.
    """

    path: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    instruction: tuple[str, ...] = ()
    ratio: float | None = None
    max_rows: int | None = None
    num_negatives: int | None = None
    negatives: str = "first"
    symmetric: bool = False
    drop_empty: bool = False

    @classmethod
    def parse(cls, entry: Any, where: str) -> Source:
        """Check one entry of a mixture file.

        Raises:
            InputError: unknown key, wrong type or impossible value, naming `where` and the key.
        """
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}: expected keys such as 'path', found {entry!r}")
        known = {f.name for f in fields(cls)}
        if unknown := [key for key in entry if key not in known]:
            raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if not isinstance(entry.get("path"), str) or not entry["path"].strip():
            raise InputError(f"{where}: 'path' must name a file, a folder or a Hub id, found {entry.get('path')!r}")
        entry = {"name": _default_name(entry["path"]), **entry}
        where = where if where == entry["path"] else f"{where} ({entry['name']})"

        for key, (is_valid, meaning) in _RULES.items():
            if key in entry and not is_valid(entry[key]):
                raise InputError(f"{where}: {key!r} must be {meaning}, found {entry[key]!r}")
        if "ratio" in entry and "max_rows" in entry:
            raise InputError(f"{where}: give 'ratio' or 'max_rows', not both")
        instruction, columns = entry.get("instruction", []), entry.get("columns", {})
        instructions = [instruction] if isinstance(instruction, str) else instruction
        for role, column in columns.items():
            if role not in ROLES:
                raise InputError(f"{where}: unknown role {role!r} in 'columns'; roles: {', '.join(ROLES)}")
            several = isinstance(column, list) and column and role in ("positive", "negative")
            if not (_are_texts(column) if several else isinstance(column, str) and column.strip()):
                raise InputError(f"{where}: column of {role!r} must be a column's name, found {column!r}")
        if columns and not {"query", "positive"} <= set(columns):
            raise InputError(f"{where}: 'columns' must name at least 'query' and 'positive'")
        if instructions and "instruction" in columns:
            raise InputError(f"{where}: the instruction is given as a text and as a column; keep one")
        return cls(**{**entry, "columns": dict(columns), "instruction": tuple(instructions)})


def read_mixture(
    source: str | Path | Mapping, *, config: str | None = None, max_rows: int | None = None
) -> tuple[list[Source], int]:
    """Read a mixture: a YAML file, its content, or anything that `Source.path` takes.

    Args:
        source: what to read.
        config, max_rows: of a single dataset; a mixture names them per dataset.

    Returns:
        The datasets and the seed of sampling (`DEFAULT_SEED` unless the file says otherwise).

    Raises:
        InputError: the file is not YAML, or an entry is wrong.
    """
    single = {key: value for key, value in (("config", config), ("max_rows", max_rows)) if value is not None}
    if isinstance(source, Mapping):
        where, mixture = "mixture", source
    elif str(source).endswith((".yaml", ".yml")):
        where, mixture = os.path.abspath(source), read_yaml(source)
    else:
        return [Source.parse({"path": str(source), **single}, str(source))], DEFAULT_SEED
    if single:
        raise InputError(f"{where}: a mixture sets {next(iter(single))!r} for each of its datasets, not as a whole")
    if not isinstance(mixture.get("datasets"), list) or not mixture["datasets"]:
        raise InputError(f"{where}: expected 'datasets:' with a list of datasets")
    if unknown := set(mixture) - {"datasets", "seed"}:
        raise InputError(f"{where}: unknown key {sorted(map(str, unknown))[0]!r}; known: datasets, seed")
    seed = mixture.get("seed", DEFAULT_SEED)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"{where}: 'seed' must be a whole number >= 0, found {seed!r}")
    sources = [Source.parse(entry, f"{where}, dataset {i}") for i, entry in enumerate(mixture["datasets"], 1)]
    if not isinstance(source, Mapping):
        sources = [replace(entry, path=beside(source, entry.path)) for entry in sources]
    names = [entry.name for entry in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{where}: two datasets are called {repeated[0]!r}; give each its own 'name'")
    return sources, seed


def _default_name(path: str) -> str:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"(\.(jsonl|json|parquet|csv|tsv|gz|zst))+$", "", name) or name


def _are_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
