"""`hf-e5 validate`: check a training mixture before training on it."""

from __future__ import annotations

import argparse

from ..data.validation import validate_mixture
from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", help="mixture YAML, data file (jsonl, parquet), built folder or Hub id")
    parser.add_argument("--dataset_config", help="configuration of a single folder or Hub id, such as 'sts'")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--tokenizer", metavar="MODEL", help="also report lengths in tokens of this model")


def run(args: argparse.Namespace) -> int:
    tokenizer = None
    if args.tokenizer:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the tokenizer of {args.tokenizer}: {str(error).splitlines()[0]}") from error
    reports = validate_mixture(args.mixture, config=args.dataset_config, split=args.split, tokenizer=tokenizer)
    print("\n".join(map(str, reports)))
    if errors := sum(report.errors for report in reports):
        bad = ", ".join(report.name for report in reports if report.errors)
        raise InputError(f"{errors} errors in {bad}, see above ('drop_empty: true' leaves rows without text out)")
    print(f"{sum(report.rows for report in reports)} rows are ready: train with `dataset_name: {args.mixture}`")
    return 0
