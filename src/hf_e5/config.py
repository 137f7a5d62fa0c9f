"""Configs: YAML files, and dataclasses whose fields are flags."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError, did_you_mean
from .shipped_recipes import config_path


_DATA_FILE = r"\.(ya?ml|jsonl?|parquet|csv|tsv|gguf)(\.\w+)?$"


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
    from transformers import HfArgumentParser  # here, as it takes a second and stages only read YAML

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(message)  # one line, without the usage of 200 flags

    parser = Parser(types, prog=prog, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of the other flags, or the name of a shipped recipe; flags override it",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    config = Parser((), add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    name = config.parse_known_args(argv)[0].config
    if name is not None:
        path = config_path(name, "training")
        known = {field.name for type_ in types for field in dataclasses.fields(type_) if field.init}
        values = read_yaml(path)
        for key in values:
            if key not in known:
                raise InputError(f"{path}: no option is called {key!r}{did_you_mean(str(key), known)}")
        for key in (key for type_ in types for key in getattr(type_, "INPUT_PATHS", ())):
            if isinstance(values.get(key), str):
                values[key] = beside(path, values[key])
        parser.set_defaults(**values)  # YAML reads 1e-4 as text; argparse parses text defaults as if they were flags
        # A required flag that the file gives is no longer required.
        for action in parser._actions:
            action.required = action.required and action.default in (None, dataclasses.MISSING)
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # of TrainingArguments: no bf16 on this device, say
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise InputError(f"no option is called {unknown[0]!r}{did_you_mean(unknown[0].partition('=')[0], flags)}")
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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of `name: value` lines.

    Raises:
        InputError: it cannot be read, is no YAML or holds something else.
    """
    path = Path(path).absolute()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines, found {type(values).__name__}")
    return values


def beside(path: str | Path, value: str) -> str:
    """Resolve a path that stands in the file `path`: it is relative to the folder of that file.

    What has the form of a Hub id (`name`, `user/name`) stays one, unless a file or folder of that name is there.
    """
    if "://" in value or os.path.isabs(value):
        return value
    resolved = os.path.abspath(os.path.join(os.path.dirname(path), value))
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and not re.search(_DATA_FILE, value)
    return value if is_hub_id and not os.path.exists(resolved) else resolved
