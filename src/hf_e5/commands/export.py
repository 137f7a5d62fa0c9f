"""`hf-e5 export`: turn a checkpoint into a sentence-transformers folder."""

from __future__ import annotations

import argparse

import torch

from ..export.sentence_transformer import DEFAULT_INSTRUCTION, export_sentence_transformer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="adapter folder or full checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--merge", action="store_true", help="add the adapter into the weights: no base model needed")
    parser.add_argument("--instruction", default=DEFAULT_INSTRUCTION, help="of the default query prompt")
    parser.add_argument("--max_seq_length", type=int, default=512, help="tokens after which a text is cut")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; the base checkpoint's if unset"
    )


def run(args: argparse.Namespace) -> None:
    print(f"exporting {args.checkpoint}: queries with {args.instruction!r}, texts cut at {args.max_seq_length} tokens")
    report = export_sentence_transformer(
        args.checkpoint,
        args.out,
        merge=args.merge,
        instruction=args.instruction,
        max_seq_length=args.max_seq_length,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )
    print(f"checked by loading it: {report}")
    print(f'wrote {args.out}; load it with SentenceTransformer("{args.out}")')
