"""`hf-e5 push`: put a dataset or model folder on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..hub import detect_repo_type, push_to_hub


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="dataset from `hf-e5 build` or model from `hf-e5 export`")
    parser.add_argument("repo_id", metavar="REPO_ID", help="USER/NAME on the Hub; created if it does not exist")
    parser.add_argument("--public", action="store_true", help="let everyone see it (default: private)")


def run(args: argparse.Namespace) -> None:
    repo_type = detect_repo_type(Path(args.folder))
    print(f"pushing {args.folder} as a {repo_type} to {args.repo_id} ({'public' if args.public else 'private'})")
    url, changed = push_to_hub(args.folder, args.repo_id, public=args.public)
    print(f"wrote {url}" if changed else f"{url} was up to date: nothing was sent")
    if repo_type == "dataset":
        print(f'load it with load_dataset("{args.repo_id}")')
    else:
        print(f'load it with SentenceTransformer("{args.repo_id}")')
