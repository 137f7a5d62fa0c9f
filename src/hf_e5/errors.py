"""The one exception that means "your input is wrong"."""


class InputError(ValueError):
    """Wrong input from the user: one line that names what is wrong, where, and what to do.

    `hf-e5` and the recipes print the message alone and leave with exit code 2; anything else is a bug and keeps its
    traceback.
    """
