"""`hf-e5`: one command per stage.

A command is a module of `hf_e5.commands` with `add_arguments(parser)` and `run(args)`, or with `run_argv(argv)` if it
parses its flags itself; it is imported only when it is called, so that `hf-e5 --help` is instant and needs no extra.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from importlib.metadata import requires

from .environment import prepare_process
from .errors import InputError


# name: one-line help, in the order in which data flows
COMMANDS = {
    "synthesize": "write training examples with an LLM",
    "filter": "part the records of a synthesis run into kept and dropped",
    "contamination": "count the texts of test sets in training data",
    "report": "describe the records of a synthesis run and make them browsable",
    "build": "turn records into a dataset folder with a card",
    "mine": "mine hard negatives",
    "validate": "check a training mixture before training on it",
    "train": "fine-tune a model",
    "export": "turn a checkpoint into a sentence-transformers folder",
    "verify": "compare an exported folder with what it was made from",
    "push": "put a dataset or model folder on the Hub",
    "recipes": "list, find and copy the shipped configurations",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 wrong input, 130 stopped by the user."""
    argv = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = argparse.ArgumentParser(prog="hf-e5", description="Text embeddings from LLMs and LLM-written data.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, description=summary)
    try:
        if argv[:1] and argv[0] in COMMANDS:
            prepare_process()  # before torch is imported
            command = import_module(f"hf_e5.commands.{argv[0]}")
            if hasattr(command, "run_argv"):
                return command.run_argv(argv[1:]) or 0
            command.add_arguments(subparsers.choices[argv[0]])
            return command.run(parser.parse_args(argv)) or 0
        parser.parse_args(argv)  # shows the help, or what is wrong
        return 2
    except InputError as error:
        print(f"hf-e5 {argv[0]}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not (extra := _extra_with(error.name or "")):
            raise
        print(f"hf-e5 {argv[0]}: {error.name} is not installed: pip install 'hf-e5[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hf-e5 {argv[0]}: stopped; run it again to go on", file=sys.stderr)
        return 130


def _extra_with(package: str) -> str | None:
    """The extra of hf-e5 that brings a package; None if none does."""
    for requirement in requires("hf-e5") or ():
        if found := re.fullmatch(rf"{re.escape(package)}\b.*extra == ['\"](\w+)['\"].*", requirement):
            return found[1]
    return None


def _underscored(argument: str) -> str:
    """`--max-length=3` as `--max_length=3`: both forms are accepted everywhere, as in transformers."""
    return re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), argument)


if __name__ == "__main__":
    sys.exit(main())
