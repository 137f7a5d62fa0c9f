"""What OpenAI-compatible servers differ in: structured output and sampling parameters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from .config import SynthesisConfig
from .taxonomy import answer_schema


RESPONSE_FORMATS = ("json_schema", "json_object", "text")  # the strictest first
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "grammar", "guided")


@dataclass(frozen=True)
class Call:
    """One call to a model.

    Attributes:
        id: the request; also its name in the provider's logs.
        answer_model: the shape to ask for where the server can; any JSON object when None.
        expected_tokens: estimate for prompt and answer.
        attempt: another attempt samples with another seed.
    """

    id: str
    model: str
    messages: list[dict[str, str]]
    answer_model: type[BaseModel] | None
    expected_tokens: tuple[int, int]
    attempt: int = 1


@dataclass(frozen=True)
class ServerCapabilities:
    """What a model behind a server accepts."""

    response_format: str = RESPONSE_FORMATS[0]
    token_limit: str | None = "max_completion_tokens"
    temperature: bool = True
    top_p: bool = True
    seed: bool = True

    def body(self, call: Call, config: SynthesisConfig) -> dict[str, Any]:
        """Return the body of a chat request."""
        body: dict[str, Any] = {"model": call.model, "messages": call.messages}
        if self.temperature:
            body["temperature"] = config.temperature
        if self.top_p:
            body["top_p"] = config.top_p
        if self.seed:
            # Where a server honours it, a run can be repeated, and equal prompts still give different examples.
            body["seed"] = zlib.crc32(f"{call.id}:{call.attempt}".encode()) >> 1
        if self.token_limit and config.max_answer_tokens:
            body[self.token_limit] = config.max_answer_tokens
        if self.response_format == "json_schema" and call.answer_model is not None:
            schema = {"name": call.answer_model.__name__, "schema": answer_schema(call.answer_model), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.response_format != "text":
            body["response_format"] = {"type": "json_object"}
        return body

    def without(self, refused: str) -> ServerCapabilities | None:
        """Return the capabilities less what an error message (status 400 or 422) refuses, None if it names nothing."""
        refused = refused.lower()
        if "context_length" in refused or "context length" in refused:
            return None
        if self.response_format != RESPONSE_FORMATS[-1] and any(word in refused for word in _FORMAT_WORDS):
            weaker = RESPONSE_FORMATS[RESPONSE_FORMATS.index(self.response_format) + 1]
            return replace(self, response_format=weaker)
        if self.token_limit and ("max_completion_tokens" in refused or "max_tokens" in refused):
            return replace(self, token_limit="max_tokens" if self.token_limit == "max_completion_tokens" else None)
        for name in ("temperature", "top_p", "seed"):
            if getattr(self, name) and name in refused:
                changes: dict[str, Any] = {name: False}
                return replace(self, **changes)
        return None
