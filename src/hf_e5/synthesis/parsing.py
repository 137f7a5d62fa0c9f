"""Reading what a model wrote: JSON out of free text, checked against a pydantic model. Nothing is ever evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from .taxonomy import TaskList


_CLOSING = {"{": "}", "[": "]"}
_LIST_LINE = re.compile(r"""^[\s\[]*(?:[-*•]\s+|\d+[.)]\s+|(?=["']))["']?(.*?)["']?[\s,\]]*$""")
# An answer opens its JSON early; the brackets of endless prose are not worth the time.
_MAX_CANDIDATES, _MAX_CHARACTERS = 20, 100_000


class ParseError(ValueError):
    """The answer cannot be read; the message says why in a few words."""


def parse_answer(text: str, model: type[BaseModel]) -> BaseModel:
    """Return an answer as an instance of `model`.

    Accepts thoughts before the answer, code fences, prose around the JSON, trailing commas, raw line breaks in
    strings and brackets that were left open between two values. A string that was cut is an error, as are missing
    keys, empty strings and values that are no strings.

    Raises:
        ParseError: no such object can be read from the text.
    """
    text = strip_thoughts(text)
    if model is TaskList:
        return _task_list(text)
    reason = ""
    for value in _json_values(text):
        if not isinstance(value, dict):
            continue
        try:
            return model.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            echoed = "properties" in value
            reason = reason or (
                "schema: the model repeated the schema instead of filling it"
                if echoed
                else f"schema: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            )
    raise ParseError(reason or "json: no JSON object in the answer")


def strip_thoughts(text: str) -> str:
    """Cut what a reasoning model thought aloud: all up to the last `</think>`, or all after an open `<think>`."""
    return text.rpartition("</think>")[2].partition("<think>")[0].strip()


def _json_values(text: str) -> Iterator[Any]:
    """Yield the JSON values that begin at the first brackets of the text."""
    text = text[:_MAX_CHARACTERS]
    for bracket in islice(re.finditer(r"[{\[]", text), _MAX_CANDIDATES):
        try:
            yield json.loads(_repair(text[bracket.start() :]), strict=False)
        except (ValueError, RecursionError):
            continue


def _repair(text: str) -> str:
    """Return the bracketed value that `text` begins with: without trailing commas, and closed if it was left open.

    A string that was cut is dropped: of a list the whole items stay, while an object loses a value and is no JSON.
    """
    out: list[str] = []
    open_brackets: list[str] = []
    in_string = escaped = False
    string_start = 0
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string, string_start = True, len(out)
        elif character in _CLOSING:
            open_brackets.append(_CLOSING[character])
        elif character in "}]":
            _drop_comma(out)
            if open_brackets.pop() != character:
                raise ValueError("brackets do not match")
            if not open_brackets:
                return "".join(out) + character
        out.append(character)
    if in_string:
        del out[string_start:]
    _drop_comma(out)
    return "".join(out + open_brackets[::-1])


def _drop_comma(out: list[str]) -> None:
    end = len(out)
    while end and out[end - 1].isspace():
        end -= 1
    if end and out[end - 1] == ",":
        del out[end - 1 :]


def _task_list(text: str) -> TaskList:
    """Read a brainstorm: from JSON in any wrapping, else from bulleted, numbered or quoted lines."""
    for value in _json_values(text):
        if isinstance(value, dict):
            value = next((item for item in value.values() if isinstance(item, list)), [])
        items = [next(iter(item.values()), None) if isinstance(item, dict) else item for item in value]
        if tasks := [item.strip() for item in items if isinstance(item, str) and item.strip()]:
            return TaskList(tasks=tasks)
    matches = [_LIST_LINE.match(line) for line in text.splitlines()]
    if lines := [match.group(1).strip() for match in matches if match and match.group(1).strip()]:
        return TaskList(tasks=lines)
    raise ParseError("json: no list of tasks in the answer")
