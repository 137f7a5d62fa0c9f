"""Read a mixture as training would and report what is wrong with it, before any training starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from ..errors import InputError
from .mixture import Row, open_source, read_rows
from .mixture_config import Source, read_mixture


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (50, 90, 99, 100)
_EXAMPLES = 3
_TOKENIZED_ROWS = 10_000


@dataclass
class Finding:
    """One kind of defect in one field of a dataset: how often, and the first rows that have it."""

    role: str
    message: str
    is_error: bool
    count: int = 0
    rows: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")
        where = f"{self.count} rows ({rows})" if self.rows else "all rows"
        return f"{'error' if self.is_error else 'warning'}: field {self.role!r}: {self.message}: {where}"


@dataclass
class SourceReport:
    """What was found in one dataset of a mixture."""

    name: str
    rows: int = 0
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    characters: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    unreadable: str | None = None

    @property
    def errors(self) -> int:
        """Rows (or 1 for a dataset that cannot be read) that training would refuse."""
        return int(self.unreadable is not None) + sum(f.count for f in self.findings.values() if f.is_error)

    @property
    def warnings(self) -> int:
        return sum(f.count for f in self.findings.values() if not f.is_error)

    def add(self, row: int, role: str, message: str, *, is_error: bool = False) -> None:
        finding = self.findings.setdefault((role, message), Finding(role, message, is_error))
        finding.count += 1
        if len(finding.rows) < _EXAMPLES:
            finding.rows.append(row)

    def __str__(self) -> str:
        if self.unreadable:
            return f"{self.name}: error: {self.unreadable}"
        lines = [f"{self.name}: {self.rows} rows, {self.errors} errors, {self.warnings} warnings"]
        lines += [f"  {finding}" for finding in self.findings.values()]
        for unit, lengths in (("characters", self.characters), ("tokens", self.tokens)):
            for role, values in lengths.items():
                shares = zip(PERCENTILES, np.percentile(values, PERCENTILES, method="higher"), strict=True)
                text = ", ".join(f"{'max' if p == 100 else f'{p} %'} {int(value)}" for p, value in shares)
                lines.append(f"  {unit} of {role} ({len(values)} texts): {text}")
        return "\n".join(lines)


def validate_mixture(
    source: str | Path | Mapping,
    *,
    config: str | None = None,
    split: str = "train",
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | Path | None = None,
) -> list[SourceReport]:
    """Check every row that training on `source` would use.

    Errors are rows that `load_mixture` refuses, and positives that are listed as their own negatives. Warnings are
    allowed but seldom meant: duplicates (also across datasets), a query that equals its positive or a negative, no
    negatives, broken characters.

    Args:
        source, config, split, cache_dir: as in `load_mixture`.
        tokenizer: also count tokens, in up to 10,000 rows of each dataset.

    Returns:
        One report per dataset, in order. A dataset that cannot be read is reported, not raised.

    Raises:
        InputError: the mixture file itself is wrong.
    """
    sources, seed = read_mixture(source, config=config)
    seen: dict[int, tuple[str, int]] = {}
    return [_validate_source(entry, split, seed, tokenizer, cache_dir, seen) for entry in sources]


def _validate_source(
    source: Source,
    split: str,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    cache_dir: str | Path | None,
    seen: dict[int, tuple[str, int]],
) -> SourceReport:
    report = SourceReport(source.name)
    try:
        dataset, numbers = open_source(source, split=split, seed=seed, cache_dir=cache_dir)
    except InputError as error:
        report.unreadable = str(error)
        return report
    report.rows = len(dataset)
    every = max(1, report.rows // _TOKENIZED_ROWS)
    with_negatives = 0
    with tqdm(total=report.rows, desc=source.name, unit=" rows", leave=False) as progress:
        for start in range(0, report.rows, 1000):
            batch = dataset[start : start + 1000]
            for number, row in zip(numbers[start : start + 1000].tolist(), read_rows(batch, source), strict=True):
                progress.update()
                with_negatives += bool(row.negatives)
                if problem := row.error():
                    is_dropped = problem.is_empty and source.drop_empty
                    report.add(number, problem.role, problem.message, is_error=not is_dropped)
                    continue
                _check_row(report, number, row, seen)
                texts = {"query": [row.query], "positive": row.positives, "negative": row.negatives}
                for role, values in texts.items():
                    if values:
                        report.characters.setdefault(role, []).extend(map(len, values))
                        if tokenizer is not None and progress.n % every == 0:
                            ids = tokenizer(values)["input_ids"]
                            report.tokens.setdefault(role, []).extend(map(len, ids))
    if not with_negatives and source.num_negatives != 0:
        report.findings["negative", "none"] = Finding("negative", "no negatives; see `hf-e5 mine`", False, report.rows)
    return report


def _check_row(report: SourceReport, number: int, row: Row, seen: dict[int, tuple[str, int]]) -> None:
    if set(row.positives) & set(row.negatives):
        report.add(number, "negative", "equals a positive of the row", is_error=True)
    if len(set(row.negatives)) < len(row.negatives):
        report.add(number, "negative", "the same text twice")
    if row.query in row.positives:
        report.add(number, "positive", "equals the query")
    if row.query in row.negatives:
        report.add(number, "negative", "equals the query")
    for role, texts in (("query", [row.query]), ("positive", row.positives), ("negative", row.negatives)):
        if any("\ufffd" in text or "\x00" in text for text in texts):
            report.add(number, role, "broken characters (U+FFFD or NUL: read with the wrong encoding?)")
    first = seen.setdefault(hash((row.query, *row.positives)), (report.name, number))
    if first != (report.name, number):
        report.add(number, "query", f"query and positive as in another row of {first[0]!r}")
