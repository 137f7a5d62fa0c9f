"""Configs: YAML read with `--config file.yaml`; any flag after it overrides."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import InputError
from .shipped_recipes import beside, config_path


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line, without the usage of 200 flags


def parse_config(types: tuple[Any, ...], argv: list[str] | None = None, *, prog: str | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config` (a YAML file or the name of a shipped recipe) and flags, in any order.

    Args:
        types: Dataclasses whose fields are the flags. Fields named in a class's `INPUT_PATHS` are, in the file,
            relative to the file; all others, and all flags, are taken as they are.
        argv: Defaults to the command line.
        prog: Name of the program in its help.

    Returns:
        One instance per type.

    Raises:
        InputError: The file is missing or no YAML mapping, a key or flag is no field of any type, or a value is wrong.
    """
    parser = _Parser(types, prog=prog, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the other flags, or the name of a shipped recipe; flags override it",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    config = _Parser((), add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    name = config.parse_known_args(argv)[0].config
    if name is not None:
        path = config_path(name, "training")
        known = {field.name for type_ in types for field in dataclasses.fields(type_) if field.init}
        values = _read(path, known)
        for key in (key for type_ in types for key in getattr(type_, "INPUT_PATHS", ())):
            if isinstance(values.get(key), str):
                values[key] = beside(path, values[key])
        parser.set_defaults(**values)
        # A required flag that the file gives is no longer required.
        for action in parser._actions:
            action.required = action.required and action.default in (None, dataclasses.MISSING)
    *filled, unknown = parser.parse_args_into_dataclasses(
        args=argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise InputError(f"no option is called {unknown[0]!r}{_did_you_mean(unknown[0].partition('=')[0], flags)}")
    return tuple(filled[: len(types)])  # what else is there only holds --config, which is dealt with


def add_fields(parser: argparse.ArgumentParser | argparse._ArgumentGroup, type_: type) -> None:
    """Add a flag for every field of a dataclass that has `help` in its metadata, with the field's type and default.

    An optional field takes what it holds, a `Literal` one of its choices, and a bool is a switch that turns it on.
    """
    hints = get_type_hints(type_)
    for item in dataclasses.fields(type_):
        if "help" not in item.metadata:
            continue
        hint = hints[item.name]
        if type(None) in get_args(hint):
            hint = next(part for part in get_args(hint) if part is not type(None))
        options: dict[str, Any] = {"default": item.default, "help": item.metadata["help"].replace("%", "%%")}
        if hint is bool:
            options["action"] = "store_true"
        else:
            options |= {"choices": get_args(hint)} if get_origin(hint) is Literal else {"type": hint}
            if item.default is dataclasses.MISSING:
                options |= {"default": None, "required": True}
            elif item.default is not None:
                options["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{item.name}", **options)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _read(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path.absolute()}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines, found {type(values).__name__}")
    for key in values:
        if key not in known:
            raise InputError(f"{path}: no option is called {key!r}{_did_you_mean(str(key), known)}")
    return values  # YAML reads 1e-4 as text; argparse parses text defaults as if they were flags
