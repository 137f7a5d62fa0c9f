"""`hf-e5 synthesize`: write training examples with an LLM."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..errors import InputError
from ..records import FAILURES_FILE, RECORDS_FILE
from ..synthesis.config import load_config
from ..synthesis.cost import describe_plan
from ..synthesis.pipeline import SynthesisOptions, SynthesisResult, make_plan, synthesize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="what to generate: a YAML file, or the name of a shipped recipe (hf-e5 recipes)",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME[=SHARE]",
        help="model, or several with their shares of the calls: gpt-4o=0.75 gpt-4o-mini=0.25",
    )
    parser.add_argument("--base_url", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run; go on by naming it again")
    parser.add_argument("--max_examples", type=int, metavar="N", help="stop after the first N examples of the plan")
    parser.add_argument("--max_usd", type=float, metavar="USD", help="stop when the folder has cost this much")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="stop when the folder has used this many tokens")
    parser.add_argument("--seed", type=int, default=0, help="the same seed plans the same requests (default: 0)")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests at once (default: 64)")
    parser.add_argument("--requests_per_minute", type=float, metavar="N")
    parser.add_argument("--tokens_per_minute", type=float, metavar="N")
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="this machine's part of the plan, 0/4 to 3/4"
    )
    parser.add_argument("--mode", choices=("online", "batch"), default="online", help="batch: OpenAI Batch API")
    parser.add_argument("--retry_failures", action="store_true", help="ask again for what is in failures.jsonl")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and an estimate of its cost")


def run(args: argparse.Namespace) -> int:
    names = {field.name for field in fields(SynthesisOptions)}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    chosen["models"] = _models(args.model) if args.model else None
    if args.dry_run:
        options = SynthesisOptions(**chosen)
        plan = make_plan(load_config(args.config, models=options.models), options)
        print(describe_plan(plan, options.max_examples))
        return 0
    result = synthesize(args.config, args.output, **chosen)
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
