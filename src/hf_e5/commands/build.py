"""`hf-e5 build`: turn records into a dataset folder with a card."""

from __future__ import annotations

import argparse

from ..data.build import TEST_SIZE, build_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", help="record files (JSONL), or folders written by `hf-e5 synthesize`")
    parser.add_argument("out", metavar="OUT", help="dataset folder to write; must not exist")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="licence identifier of the Hub, such as mit or cc-by-4.0"
    )
    parser.add_argument(
        "--test_size",
        type=float,
        default=TEST_SIZE,
        help="share of the tasks in the test split (default: %(default)s)",
    )
    parser.add_argument(
        "--max_shard_size", default="500MB", help="most text in one parquet file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    infos = build_dataset(
        args.records,
        args.out,
        license=args.license,
        test_size=args.test_size,
        max_shard_size=args.max_shard_size,
    )
    print(f"{'config':<14} {'train':>9} {'test':>7}")
    for name, info in infos.items():
        counts = {split: info.splits[split].num_examples if split in info.splits else 0 for split in ("train", "test")}
        print(f"{name:<14} {counts['train']:>9,} {counts['test']:>7,}")
    print(f"wrote {args.out}; load it with load_dataset({args.out!r}), read its card {args.out}/README.md, then:")
    print(f"  hf-e5 push {args.out} USER/NAME")
