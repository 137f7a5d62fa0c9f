"""`hf-e5 synthesize`: write training examples with an LLM."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..config import add_fields
from ..errors import InputError
from ..records import FAILURES_FILE, RECORDS_FILE
from ..synthesis.cost import describe_plan
from ..synthesis.pipeline import SynthesisOptions, SynthesisResult, make_plan, synthesize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="what to generate: a YAML file, or the name of a shipped recipe (hf-e5 recipes)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run; go on by naming it again")
    parser.add_argument(
        "--model",
        dest="models",
        nargs="+",
        metavar="NAME[=SHARE]",
        help="model, or several with their shares of the calls: gpt-4o=0.75 gpt-4o-mini=0.25",
    )
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="this machine's part of the plan, 0/4 to 3/4"
    )
    add_fields(parser, SynthesisOptions)
    parser.add_argument("--dry_run", action="store_true", help="print the plan and an estimate of its cost")


def run(args: argparse.Namespace) -> int:
    names = {field.name for field in fields(SynthesisOptions)}
    options = {name: value for name, value in vars(args).items() if name in names}
    options["models"] = _models(args.models) if args.models else None
    if args.dry_run:
        print(describe_plan(make_plan(args.config, SynthesisOptions(**options)), args.max_examples))
        return 0
    result = synthesize(args.config, args.output, **options)
    print(_report(result))
    return 1 if result.failed else 0


def _report(result: SynthesisResult) -> str:
    records, failures = result.folder / RECORDS_FILE, result.folder / FAILURES_FILE
    tokens = result.prompt_tokens + result.completion_tokens
    lines = [
        f"wrote {records}: {result.examples:,} of {result.planned:,} examples ({tokens:,} tokens, ${result.usd:.2f})",
        f"wrote {failures}: {result.failures:,} requests without a usable answer",
    ]
    if result.reason:
        lines.append(f"stopped early: {result.reason}; the same command goes on")
    if result.failures:
        lines.append("next: the same command with --retry_failures asks again for what failed")
    lines.append(f"next: hf-e5 report {result.folder}")
    return "\n".join(lines)


def _models(arguments: list[str]) -> dict[str, float]:
    models = {}
    for argument in arguments:
        name, _, share = argument.partition("=")
        try:
            models[name] = float(share or 1)
        except ValueError:
            raise InputError(f"--model {argument}: expected NAME or NAME=SHARE") from None
    return models


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    try:
        return int(number), int(of)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n, for example 0/4") from None
