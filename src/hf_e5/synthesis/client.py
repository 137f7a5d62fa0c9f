"""Talking to an OpenAI-compatible server: pace, retries, and what this server understands.

`ChatClient.ask` sends one request until it is answered. It waits as long as `retry-after` says, backs off with jitter
otherwise, and never repeats a request that the server called wrong. What servers differ in (structured output, the
name of the token limit, fixed sampling) is a `Dialect`: probed once per model, corrected when the server complains.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from ..errors import InputError
from .parsing import ParseError, parse_answer
from .taxonomy import Text, answer_schema


MAX_TRIES = 8
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds; doubles from one to the other
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left until later
_PROBE_TRIES = 5  # a wrong address should not take a minute to show
LADDER = ("json_schema", "json_object", "plain")
_RETRYABLE = {408, 409, 425, 429}  # and every 5xx
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "grammar", "guided")


@dataclass(frozen=True)
class Dialect:
    """What a model behind a server accepts."""

    structured: str = LADDER[0]
    token_limit: str | None = "max_completion_tokens"
    temperature: bool = True
    top_p: bool = True


@dataclass(frozen=True)
class Answer:
    """What came back. `error` tells why there is no `text` to use; tokens are paid for all the same."""

    text: str = ""
    error: str | None = None
    final: bool = False  # another attempt would fail the same way
    finish_reason: str | None = None
    request_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Unavailable(Exception):
    """The server turns every request away (quota used up, or not reachable): stop, and go on later."""


class Pace:
    """Spreads `per_minute` units evenly over time; None is no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self.seconds = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def reserve(self, amount: float) -> float:
        """Book an amount and return the seconds to wait before using it."""
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + amount * self.seconds
        return start - now

    def correct(self, difference: float) -> None:
        """Book more (or less) once the true amount is known."""
        self._free_at += difference * self.seconds


class ChatClient:
    """An asynchronous client for one server.

    Args:
        base_url: the server's address, for example `http://localhost:8000/v1`; OpenAI's own when None.
        settings: sampling and limits sent with every request: `temperature`, `top_p`, `max_answer_tokens`, `timeout`.
        dialects: what earlier runs learned, by model.
        requests_per_minute, tokens_per_minute: upper limits on what is sent.

    The key is read from `OPENAI_API_KEY`; it is neither stored nor logged. Local servers need none.
    """

    def __init__(
        self,
        base_url: str | None,
        settings: Any,
        *,
        dialects: dict[str, Dialect] | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)
        if key is None:
            raise InputError("no --base_url and no OPENAI_API_KEY in the environment; set one of them")
        self.base_url = base_url
        self.settings = settings
        self.dialects = dialects if dialects is not None else {}
        self._requests, self._tokens = Pace(requests_per_minute), Pace(tokens_per_minute)
        self.openai = openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=settings.timeout)

    async def close(self) -> None:
        await self.openai.close()

    async def probe(self, model: str, report: Callable[[str, Answer], Awaitable[None]]) -> None:
        """Find the highest rung of the ladder (JSON schema, JSON mode, plain text) that the server truly follows.

        A server that ignores `response_format` answers the question in prose; one that knows it gives JSON.
        `report` is awaited with the rung and the answer of each question.

        Raises:
            Unavailable: the server does not answer.
        """
        messages = [{"role": "user", "content": "What is the capital of France? (json)"}]
        for structured in LADDER[:-1]:
            self.dialects[model] = replace(self.dialects.get(model, Dialect()), structured=structured)
            answer = await self.ask(
                model, messages, Capital if structured == "json_schema" else None, (30, 30), tries=_PROBE_TRIES
            )
            if answer.final and not answer.finish_reason:
                raise Unavailable(f"{self.base_url or 'the OpenAI API'}: {answer.error}")
            await report(structured, answer)
            if self.dialects[model].structured == structured and _is_json(answer, structured):
                return
        self.dialects[model] = replace(self.dialects[model], structured=LADDER[-1])

    def parameters(
        self, model: str, messages: list[dict[str, str]], answer_model: type[BaseModel] | None
    ) -> dict[str, Any]:
        """Return the body of a chat request in the model's dialect."""
        dialect = self.dialects.get(model, Dialect())
        body: dict[str, Any] = {"model": model, "messages": messages}
        if dialect.temperature:
            body["temperature"] = self.settings.temperature
        if dialect.top_p:
            body["top_p"] = self.settings.top_p
        if dialect.token_limit and self.settings.max_answer_tokens:
            body[dialect.token_limit] = self.settings.max_answer_tokens
        if dialect.structured == "json_schema" and answer_model is not None:
            schema = {"name": answer_model.__name__, "schema": answer_schema(answer_model), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif dialect.structured != "plain":
            body["response_format"] = {"type": "json_object"}
        return body

    async def ask(
        self,
        model: str,
        messages: list[dict[str, str]],
        answer_model: type[BaseModel] | None,
        expected_tokens: tuple[int, int],
        tries: int = MAX_TRIES,
    ) -> Answer:
        """Send one request until it is answered, at most `tries` times.

        Returns:
            The answer, with an `error` if it has no text to use or did not come (`store` lists the errors).

        Raises:
            InputError: wrong key, model or address.
            Unavailable: the account's quota is used up, or the server asks for a very long wait.
        """
        error = ""
        for attempt in range(1, tries + 1):
            wait = max(self._requests.reserve(1), self._tokens.reserve(sum(expected_tokens)))
            if wait:
                await asyncio.sleep(wait)
            delay = min(FIRST_DELAY * 2 ** (attempt - 1), LONGEST_DELAY) * random.uniform(0.75, 1.25)
            dialect = self.dialects.get(model, Dialect())
            try:
                completion = await self.openai.chat.completions.create(
                    **self.parameters(model, messages, answer_model)
                )
                answer = read_completion(completion)
                self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - sum(expected_tokens))
                return answer
            except openai.APIStatusError as failure:
                error = f"http {failure.status_code}: {_short(failure.message)}"
                self._raise_if_hopeless(failure)
                if failure.status_code in (400, 422) and self._adapt(model, dialect, f"{failure.body} {error}"):
                    continue
                if failure.status_code not in _RETRYABLE and failure.status_code < 500:
                    return Answer(error=error, final=True, request_id=failure.request_id)
                delay = max(delay, _retry_after(failure.response.headers))
            except openai.APITimeoutError:
                error = f"timeout: no answer in {self.settings.timeout:g} s"
            except openai.APIConnectionError as failure:
                error = f"connection: {_short(str(failure.__cause__ or failure))}"
            except (openai.APIError, ValueError) as failure:  # a body that is no JSON, or no chat completion
                error = f"body: {_short(str(failure))}"
            if delay > LONGEST_WAIT:
                raise Unavailable(f"the server asks to wait {delay / 60:.0f} minutes ({error})")
            if attempt < tries:
                await asyncio.sleep(delay)
        return Answer(error=f"{error} ({tries} tries)", final=True)

    def _raise_if_hopeless(self, failure: openai.APIStatusError) -> None:
        """Raise for what concerns every request, not this one."""
        status = failure.status_code
        if status in (401, 403, 404):
            address = self.base_url or "the OpenAI API"
            raise InputError(f"{address} says {status}: {_short(failure.message)}; check key, --model and --base_url")
        if status == 402 or failure.code == "insufficient_quota":
            raise Unavailable(f"the account's quota is used up ({_short(failure.message)})")

    def _adapt(self, model: str, used: Dialect, complaint: str) -> bool:
        """Change the model's dialect after a complaint about a parameter; False if the complaint is about none."""
        if self.dialects.get(model, Dialect()) != used:
            return True  # another request met the same complaint first
        complaint = complaint.lower()
        if "context_length" in complaint or "context length" in complaint:
            return False
        changed = used
        if used.structured != LADDER[-1] and any(word in complaint for word in _FORMAT_WORDS):
            changed = replace(used, structured=LADDER[LADDER.index(used.structured) + 1])
        elif "max_completion_tokens" in complaint or "max_tokens" in complaint:
            changed = replace(used, token_limit="max_tokens" if used.token_limit == "max_completion_tokens" else None)
        elif "temperature" in complaint:
            changed = replace(used, temperature=False)
        elif "top_p" in complaint:
            changed = replace(used, top_p=False)
        self.dialects[model] = changed
        return changed != used


class Capital(BaseModel):
    """The answer to the probe."""

    capital: Text


def read_completion(completion: Any) -> Answer:
    """Turn a chat completion into an `Answer`.

    Raises:
        ValueError: the server sent something else.
    """
    if not isinstance(completion, ChatCompletion) or not getattr(completion, "choices", None):
        raise ValueError(f"no chat completion but {str(completion)[:80]!r}")
    choice, usage = completion.choices[0], completion.usage
    message = choice.message
    answer = Answer(
        text=message.content or "",
        finish_reason=choice.finish_reason,
        request_id=getattr(completion, "_request_id", None) or completion.id,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )
    if getattr(message, "refusal", None) or choice.finish_reason == "content_filter":
        return replace(answer, error=f"refusal: {_short(message.refusal or 'content filter')}", final=True)
    if not answer.text.strip() and choice.finish_reason != "length":
        return replace(answer, error="empty: the answer has no text")
    return answer


def _is_json(answer: Answer, structured: str) -> bool:
    if answer.error:
        return False
    try:
        if structured == "json_schema":
            parse_answer(answer.text, Capital)
        return answer.text.lstrip().startswith("{") or structured == "json_schema"
    except ParseError:
        return False


def _retry_after(headers: Any) -> float:
    """Return the seconds that a server asks to wait, 0 if it names none."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers.get(name)) * scale)
        except (TypeError, ValueError):
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, TypeError, ValueError):
        return 0.0


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
