"""`hf-e5 filter`: part the records of a synthesis run into kept and dropped."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..filters.contamination import TestSets
from ..filters.margins import DEFAULT_MARGIN
from ..filters.record_filters import FilterSettings
from ..filters.run import NEAR_DUPLICATE_THRESHOLD, OPTIONAL_FILTERS, filter_records
from ..records import DROPPED_FILE, FILTERS_FILE, KEPT_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a synthesis run, with records.jsonl")
    parser.add_argument("--against", metavar="FILE", nargs="+", default=[], help="records of earlier runs")
    parser.add_argument(
        "--test_sets",
        metavar="PATH",
        nargs="+",
        default=[],
        help="files or folders of texts that training must not see",
    )
    parser.add_argument("--near_duplicate_threshold", type=float, default=NEAR_DUPLICATE_THRESHOLD)
    parser.add_argument("--embedding_model", metavar="NAME", help="SentenceTransformer that checks the negatives")
    parser.add_argument(
        "--margin", type=float, default=DEFAULT_MARGIN, help="cosine by which a positive must beat its negative"
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="FILTER", help=f"any of {', '.join(OPTIONAL_FILTERS)}"
    )
    parser.add_argument("--num_proc", type=int, help="processes (default: one per CPU core)")


def run(args: argparse.Namespace) -> None:
    model = None
    if args.embedding_model:
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(args.embedding_model)
        except OSError as error:
            raise InputError(f"--embedding_model {args.embedding_model}: {str(error).splitlines()[0]}") from None
    summary = filter_records(
        args.directory,
        settings=FilterSettings(test_sets=TestSets.from_files(args.test_sets) if args.test_sets else None),
        against=args.against,
        near_duplicate_threshold=args.near_duplicate_threshold,
        embedding_model=model,
        margin=args.margin,
        skip=args.skip,
        num_proc=args.num_proc,
    )
    for name, count in summary.dropped.items():
        print(f"{name:26}{count:>10,}")
    print(f"{'kept':26}{summary.kept:>10,} of {summary.records:,}")
    print(f"wrote {KEPT_FILE}, {DROPPED_FILE} and {FILTERS_FILE} to {args.directory}")
    print(f"next: hf-e5 report {args.directory}, then hf-e5 build {args.directory / KEPT_FILE} OUT")
