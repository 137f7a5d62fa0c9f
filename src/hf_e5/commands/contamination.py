"""`hf-e5 contamination`: count the texts of test sets in training data."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from ..filters.contamination import (
    MIN_CHARACTERS,
    TEXT_FILES,
    TestSets,
    check_contamination,
    find_text_files,
    read_texts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = ", ".join(TEXT_FILES)
    parser.add_argument("train", metavar="TRAIN", nargs="+", help=f"training data: {kinds} files or folders of them")
    parser.add_argument("--test_sets", metavar="TEST", nargs="+", required=True, help="the same for test sets")
    parser.add_argument(
        "--min_characters", type=int, default=MIN_CHARACTERS, help="shorter texts are low-entropy (%(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the report to this JSON file as well")


def run(args: argparse.Namespace) -> None:
    test_sets = TestSets.from_files(args.test_sets, args.min_characters)
    files = list(find_text_files(args.train))
    texts = ((f"{path}: text {n}", text) for path in files for n, text in enumerate(read_texts(path), start=1))
    report = check_contamination(tqdm(texts, desc="training texts", unit=" texts"), test_sets)
    print(report.to_markdown())
    if args.output:
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
        args.output.write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"wrote {args.output}")
    print("next: hf-e5 filter DIR --test_sets " + " ".join(map(str, args.test_sets)))
