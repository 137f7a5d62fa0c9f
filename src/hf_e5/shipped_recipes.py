"""The shipped configurations, found by name, shown and copied.

The folder `recipes/` of the repository is part of the package: `src/hf_e5/recipes` links to it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import InputError, did_you_mean


RECIPES = Path(__file__).resolve().with_name("recipes").resolve()
FOLDERS = {
    "training": "configs",
    "mixture": "configs/mixtures",
    "synthesis": "synthesis",
    "accelerate": "accelerate_configs",
}


class Recipe(NamedTuple):
    """A shipped YAML file; `kind` is a key of `FOLDERS`, the description its first comment line."""

    name: str
    kind: str
    path: Path

    @property
    def description(self) -> str:
        with open(self.path, encoding="utf-8") as lines:
            return next(lines).removeprefix("#").strip()


def list_recipes(kind: str | None = None) -> list[Recipe]:
    """Return the shipped recipes, of one kind or of all."""
    kinds = [kind] if kind else list(FOLDERS)
    return [Recipe(path.stem, k, path) for k in kinds for path in sorted((RECIPES / FOLDERS[k]).glob("*.yaml"))]


def find_recipe(name: str, kind: str | None = None) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        InputError: there is none of this name (and kind).
    """
    recipes = {recipe.name: recipe.path for recipe in list_recipes(kind)}
    if name not in recipes:
        what = f"{kind} recipe" if kind else "recipe"
        hint = did_you_mean(name, recipes)
        raise InputError(f"{name}: no such file here, and no shipped {what}{hint} (see hf-e5 recipes)")
    return recipes[name]


def config_path(value: str, kind: str) -> Path:
    """Return the file that `--config` means: a path, or the name of a shipped recipe if no such file exists.

    Raises:
        InputError: a name without suffix or folder that is neither.
    """
    if Path(value).is_file() or Path(value).name != value or Path(value).suffix in (".yaml", ".yml"):
        return Path(value)
    return find_recipe(value, kind)


def copy_recipe(name: str, folder: str | Path) -> list[Path]:
    """Copy a recipe, and the shipped files that it names, to edit. The copies lie as they do in `recipes/`.

    Returns:
        The new files, the recipe first.

    Raises:
        InputError: there is no such recipe, or a file exists already.
    """
    sources = list(dict.fromkeys(_with_named_files(find_recipe(name))))
    targets = [Path(folder) / source.relative_to(RECIPES) for source in sources]
    for target in targets:
        if target.exists():
            raise InputError(f"{target}: exists; choose another folder")
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return targets


def _with_named_files(path: Path) -> Iterator[Path]:
    yield path
    if path.suffix == ".yaml":
        for word in re.findall(r"[\w./-]+", path.read_text(encoding="utf-8")):
            named = Path(os.path.normpath(path.parent / word))
            if named != path and named.is_relative_to(RECIPES) and named.is_file():
                yield from _with_named_files(named)
