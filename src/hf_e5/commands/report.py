"""`hf-e5 report`: describe the records of a synthesis run and make them browsable."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from ..records import KEPT_FILE
from ..report.write import MAX_ROWS, headline_figures, is_stale, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a synthesis run")
    parser.add_argument("--output", metavar="OUT", type=Path, help="folder of the report (default: DIR/report)")
    parser.add_argument(
        "--max_rows", type=int, default=MAX_ROWS, help="most records on the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    if args.max_rows < 1:
        raise InputError(f"--max_rows {args.max_rows}: must be at least 1")
    report = write_report(args.directory, args.output, args.max_rows)
    out = args.output or args.directory / "report"
    for label, value in headline_figures(report):
        print(f"{label:26}{value:>12}")
    for name in ("task_types", "languages"):
        largest = list(report[name].items())[:6]
        print(f"{name:26}" + ", ".join(f"{key} {count / report['records']:.1%}" for key, count in largest))
    print(f"wrote {out / 'index.html'}, figure2.png, figure2.svg and report.json")
    if "filters" not in report:
        print(f"next: hf-e5 filter {args.directory}")
        return
    if is_stale(args.directory):
        print(f"records.jsonl has changed since the filters ran: hf-e5 filter {args.directory}", file=sys.stderr)
    print(f"next: hf-e5 build {args.directory / KEPT_FILE} OUT")
