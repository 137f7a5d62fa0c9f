"""The one exception that means "your input is wrong", and how a program ends on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Wrong input from the user: one line that names what is wrong, where, and what to do.

    `hf-e5` and the recipes print the message alone and leave with exit code 2; anything else is a bug and keeps its
    traceback.
    """


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Turn an `InputError` inside the block into one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
