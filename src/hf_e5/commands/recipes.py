"""`hf-e5 recipes`: list, find and copy the shipped configurations."""

from __future__ import annotations

import argparse

from ..errors import InputError
from ..shipped_recipes import copy_recipe, find_recipe, list_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print the path of this recipe; without it, list all")
    parser.add_argument("--copy", metavar="DIR", help="copy the recipe, and the files that it names, to edit them")


def run(args: argparse.Namespace) -> None:
    if args.name is None:
        if args.copy:
            raise InputError("--copy needs the NAME of a recipe")
        recipes = list_recipes()
        width = max(len(recipe.name) for recipe in recipes)
        for recipe in recipes:
            print(f"{recipe.kind:<11} {recipe.name:<{width}}  {recipe.description}")
    elif args.copy:
        paths = copy_recipe(args.name, args.copy)
        print("\n".join(f"wrote {path}" for path in paths))
    else:
        print(find_recipe(args.name))
