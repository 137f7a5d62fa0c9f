"""Configs: YAML read with `--config file.yaml`; any flag after it overrides."""

from __future__ import annotations

import dataclasses
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .errors import InputError


def parse_config(types: tuple[Any, ...], argv: list[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config file.yaml` and flags.

    Args:
        types: Dataclasses whose fields are the flags.
        argv: Defaults to the command line.

    Returns:
        One instance per type.

    Raises:
        InputError: The file is missing or no YAML mapping, or a key is no field of any type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the flags below; flags override it")
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise InputError("--config needs a file")
        known = {field.name for type_ in types for field in dataclasses.fields(type_) if field.init}
        parser.set_defaults(**_read(argv[at + 1], known))
        # A required flag that the file gives is no longer required.
        for action in parser._actions:
            action.required = action.required and action.default in (None, dataclasses.MISSING)
        del argv[at : at + 2]
    *filled, unknown = parser.parse_args_into_dataclasses(
        args=argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise InputError(f"no option is called {unknown[0]!r}; --help lists them all")
    return tuple(filled[: len(types)])  # what else is there only holds --config, which is dealt with


def _read(path: str, known: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `name: value` lines, found {type(values).__name__}")
    for key in values:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: no option is called {key!r}{hint}")
    return values  # YAML reads 1e-4 as text; argparse parses text defaults as if they were flags
