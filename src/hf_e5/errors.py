"""The one exception that means "your input is wrong"."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Wrong input from the user: one line that names what is wrong, where, and what to do.

    `hf-e5` and the recipes print the message alone and leave with exit code 2; anything else is a bug and keeps its
    traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the known one that is most like it, if any is."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
