"""Describe the records of a synthesis run and make them browsable.

    DIR/report/index.html               one self-contained page: overview, and records to browse, filter and search
    DIR/report/figure2.png, figure2.svg shares of task types and languages (paper, figure 2)
    DIR/report/report.json              all figures

Where the filters ran (`hf-e5 filter`), the figures are those of the kept records.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import InputError
from ..files import whole_folder
from ..languages import load_languages
from ..records import (
    ANSWERS_FILE,
    DROPPED_FILE,
    FILTERS_FILE,
    KEPT_FILE,
    MARGINS_FILE,
    RECORDS_FILE,
    read_any_rows,
    read_json,
    record_problem,
)
from .figures import plot_shares
from .page import Table, render_page
from .statistics import Sample, Statistics, read_margins, read_usage


# Lists the files of a report: only a folder that has it, and no other files, is replaced.
MARKER_FILE = ".hf-e5-report"
# Rows that the page carries: about 30 MB of text, which a browser opens in about a second.
MAX_ROWS = 20_000


def write_report(directory: str | Path, out: str | Path | None = None, max_rows: int = MAX_ROWS) -> dict[str, Any]:
    """Write the report of a synthesis run and return its figures (the content of report.json).

    Args:
        directory: folder of the run, with records.jsonl and, after `hf-e5 filter`, kept.jsonl and dropped.jsonl.
        out: folder to write. None for `directory`/report. An earlier report there is replaced as a whole; any other
            folder, and a report that files were added to, is an error.
        max_rows: most records on the page; of more, it shows a random sample and says so. At most half of them are
            dropped ones.

    Raises:
        InputError: there are no records, or `out` may not be replaced.
    """
    directory = Path(directory)
    out = Path(out) if out else directory / "report"
    filtered = (directory / KEPT_FILE).is_file() and (directory / FILTERS_FILE).is_file()
    source = directory / (KEPT_FILE if filtered else RECORDS_FILE)
    if not source.is_file():
        raise InputError(f"{source}: no such file; DIR is the folder that hf-e5 synthesize wrote")
    if directory.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: holds the records and is no report; choose another folder")
    with whole_folder(out, marker=MARKER_FILE) as folder:
        return _write(directory, source, filtered, folder, max_rows)


def _write(directory: Path, source: Path, filtered: bool, folder: Path, max_rows: int) -> dict[str, Any]:
    """Count the records of `source` and write the report to the empty `folder`."""
    dropped, losses = Sample(max_rows // 2), defaultdict[str, Counter[str]](Counter)
    if filtered and (directory / DROPPED_FILE).is_file():
        for row in _progress(directory / DROPPED_FILE):
            losses[str(row.get("task_type") or "unreadable")][row["dropped_by"]] += 1
            dropped.add(row)
    kept, statistics, unreadable = Sample(max_rows - len(dropped.rows())), Statistics(), 0
    for row in _progress(source):
        if record_problem(row):
            unreadable += 1
            continue
        statistics.add(row)
        kept.add(row)
    if not len(statistics):
        raise InputError(f"{source}: no records")

    report: dict[str, Any] = {**statistics.to_dict(), "unreadable": unreadable}
    if filtered:
        report["filters"] = read_json(directory / FILTERS_FILE)
        report["dropped_by_task_type"] = {name: dict(counts.most_common()) for name, counts in losses.items()}
    report["near_duplicate_rate"] = _near_duplicate_rate(report.get("filters"))
    report["margins"] = read_margins(directory / MARGINS_FILE)
    report["usage"] = read_usage(directory / ANSWERS_FILE, len(statistics))

    _, svg = plot_shares(statistics.task_types, statistics.languages, folder / "figure2")
    page = render_page(
        title=f"{directory.resolve().name}: synthetic records",
        tiles=headline_figures(report),
        notes=_notes(kept, dropped, directory, filtered),
        tables=_tables(report),
        figure="<svg" + svg.read_text(encoding="utf-8").partition("<svg")[2],
        records=kept.rows() + dropped.rows(),
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return report


def _progress(path: Path):
    return tqdm(read_any_rows(path), desc=path.name, unit=" records")


def _near_duplicate_rate(filters: dict[str, Any] | None) -> float | None:
    """Return the share of exact and near duplicates among all records; None if they were not looked for."""
    if not filters or "near_duplicate" not in filters["dropped"]:
        return None
    repeats = filters["dropped"]["near_duplicate"] + filters["dropped"].get("exact_duplicate", 0)
    return repeats / filters["records"]


def headline_figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the report's main figures as (label, value) pairs."""
    tiles = [("records", f"{report['records']:,}")]
    if "filters" in report:
        total = report["filters"]["records"]
        tiles = [("kept", f"{report['records']:,}"), ("dropped", f"{total - report['filters']['kept']:,}")]
    tiles.append(("distinct instructions", f"{report['distinct_instructions']:,}"))
    tiles.append(("languages", f"{len(report['languages']):,}"))
    if report["usage"] and report["usage"]["usd_per_1k_records"] is not None:
        tiles.append(("USD per 1k records", f"{report['usage']['usd_per_1k_records']:.2f}"))
    return tiles


def _notes(kept: Sample, dropped: Sample, directory: Path, filtered: bool) -> list[str]:
    notes = []
    shown = len(kept.rows()) + len(dropped.rows())
    if shown < kept.seen + dropped.seen:
        notes.append(
            f"This page holds a random sample: {len(kept.rows()):,} of {kept.seen:,} kept and {len(dropped.rows()):,} "
            f"of {dropped.seen:,} dropped records. The figures are those of all records."
        )
    if not filtered:
        notes.append(f"The filters have not run: hf-e5 filter {directory}")
    elif is_stale(directory):
        notes.append(f"records.jsonl has changed since the filters ran: hf-e5 filter {directory}")
    return notes


def is_stale(directory: Path) -> bool:
    """Tell whether the records of a run changed after its filters ran."""
    records, summary = directory / RECORDS_FILE, directory / FILTERS_FILE
    return records.is_file() and records.stat().st_mtime > summary.stat().st_mtime


def _tables(report: dict[str, Any]) -> list[Table]:
    total = report["records"]
    tables = []
    if "filters" in report:
        seen = report["filters"]["records"]
        losses = [(name, f"{n:,}", f"{n / seen:.2%}") for name, n in report["filters"]["dropped"].items()]
        losses.append(("kept", f"{report['filters']['kept']:,}", f"{report['filters']['kept'] / seen:.2%}"))
        note = "The first filter that objects to a record counts it."
        tables.append(Table("Filters", ("filter", "dropped", "share"), losses, note))
    tables.append(_shares("Task types", ("task type", "records"), report["task_types"], total))
    lengths = [
        (f"{task_type}: {name}", *(f"{values[key]:,.0f}" for key in ("p5", "median", "mean", "p95")))
        for task_type, fields in report["characters"].items()
        for name, values in fields.items()
    ]
    tables.append(Table("Lengths in characters", ("text", "5 %", "median", "mean", "95 %"), lengths))
    if report["usage"]:
        tables.append(_usage_table(report["usage"]))
        if report["usage"]["errors"]:
            errors, answers = report["usage"]["errors"], report["usage"]["answers"]
            tables.append(_shares("Failed answers", ("reason", "answers"), errors, answers))
    diversity = report["diversity"]
    rows = [(name, *(f"{diversity[f'{name}_distinct_{n}']:.3f}" for n in (1, 2, 3))) for name in ("query", "positive")]
    rate = report["near_duplicate_rate"]
    repeats = "not measured (hf-e5 filter does)" if rate is None else f"{rate:.2%} of all records"
    note = (
        f"Different n-grams over all n-grams, in a sample of {diversity['records']:,} records. "
        f"Exact and near duplicates: {repeats}. Distinct instructions: {report['distinct_instructions']:,}."
    )
    tables.append(Table("Diversity", ("text", "distinct-1", "distinct-2", "distinct-3"), rows, note))
    if report["margins"]:
        rows = [(name, f"{value:.3f}") for name, value in report["margins"].items() if name != "records"]
        note = f"Cosine of query and positive less that of query and negative; {report['margins']['records']:,} rows."
        tables.append(Table("Margins of the embedding check", ("", "margin"), rows, note))
    tables.append(_shares("Models", ("model", "records"), report["models"], total))
    names = {code: language.name for code, language in load_languages().items()}
    languages = {f"{names.get(code, code)} ({code})": n for code, n in report["languages"].items()}
    tables.append(_shares("Languages of queries", ("language", "records"), languages, total))
    return tables


def _shares(title: str, columns: tuple[str, str], counts: dict[str, int], total: int) -> Table:
    rows = [(key, f"{count:,}", f"{count / total:.2%}") for key, count in counts.items()]
    return Table(title, (*columns, "share"), rows)


def _usage_table(usage: dict[str, Any]) -> Table:
    counts = ("answers", "prompt_tokens", "completion_tokens")
    rows = [
        (model, *(f"{values[name]:,}" for name in counts), _usd(values["cost"]))
        for model, values in usage["models"].items()
    ]
    per_thousand = f"{usage['tokens_per_record']:,.0f} tokens a record; {_usd(usage['usd_per_1k_records'])} per 1,000."
    note = f"All answers, failed ones and brainstorming included, over the records above: {per_thousand}"
    columns = ("model", "answers", "prompt tokens", "completion tokens", "cost")
    return Table("Tokens and cost", columns, rows, note)


def _usd(value: float | None) -> str:
    return "no price" if value is None else f"USD {value:,.2f}"
