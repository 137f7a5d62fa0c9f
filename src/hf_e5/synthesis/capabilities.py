"""What servers that call themselves OpenAI-compatible differ in: structured output and sampling parameters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel

from .taxonomy import answer_schema


LADDER = ("json_schema", "json_object", "plain")
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "grammar", "guided")


class Sampling(Protocol):
    """The settings that go into every request; a `SynthesisConfig` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def max_answer_tokens(self) -> int | None: ...


@dataclass(frozen=True)
class Call:
    """One call to a model.

    Attributes:
        id: the request; also its name in the provider's logs.
        answer_model: the shape to ask for where the server can; any JSON object when None.
        expected_tokens: of prompt and answer, before they are known.
        attempt: another attempt samples with another seed.
    """

    id: str
    model: str
    messages: list[dict[str, str]]
    answer_model: type[BaseModel] | None
    expected_tokens: tuple[int, int]
    attempt: int = 1


@dataclass(frozen=True)
class Dialect:
    """What a model behind a server accepts."""

    structured: str = LADDER[0]
    token_limit: str | None = "max_completion_tokens"
    temperature: bool = True
    top_p: bool = True
    seed: bool = True

    def body(self, call: Call, sampling: Sampling) -> dict[str, Any]:
        """Return the body of a chat request."""
        body: dict[str, Any] = {"model": call.model, "messages": call.messages}
        if self.temperature:
            body["temperature"] = sampling.temperature
        if self.top_p:
            body["top_p"] = sampling.top_p
        if self.seed:
            # Where a server honours it, a run can be repeated, and equal prompts still give different examples.
            body["seed"] = zlib.crc32(f"{call.id}:{call.attempt}".encode()) >> 1
        if self.token_limit and sampling.max_answer_tokens:
            body[self.token_limit] = sampling.max_answer_tokens
        if self.structured == "json_schema" and call.answer_model is not None:
            schema = {"name": call.answer_model.__name__, "schema": answer_schema(call.answer_model), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.structured != "plain":
            body["response_format"] = {"type": "json_object"}
        return body

    def after(self, complaint: str) -> Dialect | None:
        """Return the dialect that avoids what a server complained about (status 400 or 422), None if it is no help."""
        complaint = complaint.lower()
        if "context_length" in complaint or "context length" in complaint:
            return None
        if self.structured != LADDER[-1] and any(word in complaint for word in _FORMAT_WORDS):
            return replace(self, structured=LADDER[LADDER.index(self.structured) + 1])
        if self.token_limit and ("max_completion_tokens" in complaint or "max_tokens" in complaint):
            return replace(self, token_limit="max_tokens" if self.token_limit == "max_completion_tokens" else None)
        if self.temperature and "temperature" in complaint:
            return replace(self, temperature=False)
        if self.top_p and "top_p" in complaint:
            return replace(self, top_p=False)
        if self.seed and "seed" in complaint:
            return replace(self, seed=False)
        return None
