"""`hf-e5 verify`: compare an exported folder with what it was made from."""

from __future__ import annotations

import argparse

from ..export.verify import verify_export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="what hf-e5 export wrote")
    parser.add_argument("--checkpoint", help="the trained checkpoint; the folder's own weights if unset")


def run(args: argparse.Namespace) -> None:
    print(f"{args.folder}: {verify_export(args.folder, args.checkpoint)}")
