"""Part the records of a run into those to keep and those to drop.

    DIR/records.jsonl   what the model wrote; never changed
    DIR/kept.jsonl      the records that passed, byte for byte
    DIR/dropped.jsonl   the others, each with `dropped_by` (the filter) and `reason`
    DIR/filters.json    how many records each filter dropped, and with which settings
    DIR/margins.tsv     with an embedding model: similarity of query and positive, query and negative, by record

The file is read twice: once by several processes that judge each record and take its duplicate keys, once to write.
In between only what the duplicates need is kept (0.4 kB a record), so that memory does not depend on the texts.
Processes share the file by byte ranges: the text loader of `datasets` decodes lines, which changes CR LF and stops at
wrong UTF-8, where a line must come out as it is or be dropped by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import InputError
from ..files import whole_file
from ..records import DROPPED_FILE, FILTERS_FILE, KEPT_FILE, MARGINS_FILE, RECORDS_FILE, parse_line, read_any_rows
from .duplicates import DuplicateIndex, exact_key, signature
from .margins import DEFAULT_MARGIN, Margins, check_margins
from .record_filters import FILTERS, FilterSettings, judge


NEAR_DUPLICATE_THRESHOLD = 0.8
FILTER_NAMES = (*FILTERS, "exact_duplicate", "near_duplicate", "weak_negative")
# All but the one that the others rely on.
OPTIONAL_FILTERS = tuple(name for name in FILTER_NAMES if name != "schema")

_CHUNK_BYTES = 1 << 20


@dataclass
class FilterSummary:
    """What a filter run did; `dropped` has every filter that ran, in their order, also those that dropped nothing."""

    records: int
    kept: int
    dropped: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)


def filter_records(
    directory: str | Path,
    *,
    settings: FilterSettings | None = None,
    against: Sequence[str | Path] = (),
    near_duplicate_threshold: float = NEAR_DUPLICATE_THRESHOLD,
    embedding_model: Any = None,
    margin: float = DEFAULT_MARGIN,
    skip: Iterable[str] = (),
    num_proc: int | None = None,
) -> FilterSummary:
    """Write kept, dropped and summary files next to `directory`/records.jsonl.

    Args:
        settings: limits and test sets of the filters that look at one record.
        against: record files of earlier runs; what repeats one of their rows is a duplicate.
        near_duplicate_threshold: least Jaccard similarity of character 5-grams of near duplicates, above 0 to 1.
        embedding_model: a SentenceTransformer that scores query against positive and negative; None: no such check.
        margin: how much nearer to the query the positive must be than the negative, in cosine similarity.
        skip: names of filters (see `OPTIONAL_FILTERS`) not to run.
        num_proc: processes for language identification and MinHash; None for one per CPU core.

    Raises:
        InputError: there are no records, a file is missing, or an argument is out of range.
    """
    directory = Path(directory)
    settings = settings or FilterSettings()
    skipped = frozenset(skip)
    unknown = sorted(skipped - set(OPTIONAL_FILTERS))
    if unknown:
        raise InputError(f"skip: {unknown[0]!r} is none of {', '.join(OPTIONAL_FILTERS)}")
    if not 0 < near_duplicate_threshold <= 1:
        raise InputError(f"near_duplicate_threshold: {near_duplicate_threshold} is not above 0 and at most 1")
    source = directory / RECORDS_FILE
    earlier = [Path(path) for path in against]
    for path in (source, *earlier):
        if not path.is_file():
            raise InputError(f"{path}: no such file")

    verdicts, duplicates = _judge_files(source, earlier, settings, skipped, num_proc)
    if not verdicts:
        raise InputError(f"{source}: no records")
    if "exact_duplicate" not in skipped:
        for row, original in duplicates.exact():
            verdicts[row] = ("exact_duplicate", f"same query and positive as {original}")
    if "near_duplicate" not in skipped:
        dropped = {row for row, verdict in enumerate(verdicts) if verdict}
        for row, original in duplicates.near(near_duplicate_threshold, dropped):
            verdicts[row] = ("near_duplicate", f"query and positive nearly the same as {original}")
    margins = None
    if embedding_model is not None and "weak_negative" not in skipped:
        survivors = (row for row, verdict in zip(read_any_rows(source), verdicts, strict=False) if not verdict)
        bar = tqdm(survivors, desc="embedding", total=verdicts.count(None), unit=" records")
        margins = check_margins(bar, embedding_model, margin)

    needs = {"contamination": settings.test_sets, "weak_negative": margins}
    ran = [name for name in FILTER_NAMES if name not in skipped and needs.get(name, True)]
    summary = FilterSummary(0, 0, dict.fromkeys(ran, 0))
    summary.settings = {
        "against": [str(path) for path in earlier],
        "near_duplicate_threshold": near_duplicate_threshold,
        "test_sets": settings.test_sets.names if settings.test_sets else [],
        "embedding_margin": margin if margins else None,
    }
    _write(directory, verdicts, margins, summary)
    return summary


# None (kept so far) or (filter, reason).
Verdict = tuple[str, str] | None
# Of a row: its verdict, and id, duplicate key and signature if it is kept.
_Judged = tuple[Verdict, tuple[str, int, bytes] | None]


def _judge_files(
    source: Path, earlier: list[Path], settings: FilterSettings, skipped: frozenset[str], num_proc: int | None
) -> tuple[list[Verdict], DuplicateIndex]:
    """Judge every row of `source` and take the duplicate keys of it and of `earlier`."""
    verdicts: list[Verdict] = []
    duplicates = DuplicateIndex()
    tasks = [
        (path, start, start + _CHUNK_BYTES, path is source)
        for path in (*earlier, source)
        for start in range(0, path.stat().st_size, _CHUNK_BYTES)
    ]
    processes = min(num_proc or os.cpu_count() or 1, len(tasks))
    with ExitStack() as stack:
        results: Iterator[list[_Judged]]
        if processes > 1:
            results = stack.enter_context(Pool(processes, _initialize, (settings, skipped))).imap(_judge_chunk, tasks)
        else:
            _initialize(settings, skipped)
            results = map(_judge_chunk, tasks)
        bar = tqdm(results, desc="filtering", total=len(tasks), unit="MB")
        for (path, *_, own), rows in zip(tasks, bar, strict=True):
            for verdict, kept in rows:
                if kept:
                    name, *keys = kept
                    duplicates.add(len(verdicts) if own else -1, name if own else f"{path}: {name}", *keys)
                if own:
                    verdicts.append(verdict)
    return verdicts, duplicates


_worker: dict[str, Any] = {}


def _initialize(settings: FilterSettings, skipped: frozenset[str]) -> None:
    _worker.update(settings=settings, skipped=skipped)


def _judge_chunk(task: tuple[Path, int, int, bool]) -> list[_Judged]:
    """Judge the rows of a byte range."""
    path, start, stop, own = task
    # Rows of earlier runs are only compared with; a folder's own rows go through every filter.
    skipped = _worker["skipped"] if own else frozenset(FILTERS) - {"schema"}
    judged: list[_Judged] = []
    for line in _lines(path, start, stop):
        record, problem = parse_line(line)
        verdict = ("schema", problem) if problem else judge(record, _worker["settings"], skipped)
        if verdict:
            judged.append((verdict, None))
        else:
            pair = record["query"], record["positive"]
            judged.append((None, (record["id"], exact_key(*pair), signature(*pair).tobytes())))
    return judged


def _lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the lines that start in the bytes [start, stop) and are not blank."""
    with open(path, "rb") as file:
        if start:
            # A line that starts exactly at `start` follows a newline just before it.
            file.seek(start - 1)
            file.readline()
        while file.tell() < stop and (line := file.readline()):
            if line.strip():
                yield line


def _write(directory: Path, verdicts: list[Verdict], margins: Margins | None, summary: FilterSummary) -> None:
    """Write all files, and put them in place together at the end."""
    source = directory / RECORDS_FILE
    with ExitStack() as stack:  # puts the summary in place last: it stands for a complete set of files
        summary_file = stack.enter_context(whole_file(directory / FILTERS_FILE, "w"))
        kept = stack.enter_context(whole_file(directory / KEPT_FILE))
        # Half of a surrogate pair has no UTF-8 form; "backslashreplace" writes it as JSON's own escape.
        dropped = stack.enter_context(whole_file(directory / DROPPED_FILE, "w", errors="backslashreplace"))
        # Records that were appended since the first pass wait for the next run.
        for line, verdict in zip(_lines(source, 0, source.stat().st_size), verdicts, strict=False):
            row, _ = parse_line(line)
            if verdict is None and margins:
                verdict = margins.verdict(row["id"])
            summary.records += 1
            if verdict is None:
                summary.kept += 1
                kept.write(line if line.endswith(b"\n") else line + b"\n")
                continue
            name, reason = verdict
            summary.dropped[name] += 1
            dropped.write(json.dumps({**row, "dropped_by": name, "reason": reason}, ensure_ascii=False) + "\n")
        if margins:
            margins.write(stack.enter_context(whole_file(directory / MARGINS_FILE, "w")))
        summary_file.write(json.dumps(vars(summary), indent=2, ensure_ascii=False) + "\n")
    if not margins:
        (directory / MARGINS_FILE).unlink(missing_ok=True)
