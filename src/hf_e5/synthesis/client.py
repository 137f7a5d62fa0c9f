"""The client for OpenAI-compatible servers: rate limits, retries, and adapting to what a server supports.

`ChatClient.ask` sends one request until it is answered. It waits as long as `retry-after` says, backs off with jitter
otherwise, and never repeats a request that the server called wrong. `ServerCapabilities` are probed once per model and
corrected when the server refuses a parameter.
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
from .capabilities import RESPONSE_FORMATS, Call, ServerCapabilities
from .config import SynthesisConfig
from .parsing import ParseError, parse_answer
from .taxonomy import Text


MAX_TRIES = 8
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds; doubles from one to the other
LONGEST_WAIT = 600.0  # seconds; the run stops where a server asks for more
_PROBE_TRIES = 5  # so that a wrong address shows within a minute
_RETRYABLE = {408, 409, 425, 429}  # and every 5xx


@dataclass(frozen=True)
class Answer:
    """A server's answer. `error` says why `text` cannot be used; its tokens are billed nevertheless."""

    text: str = ""
    error: str | None = None
    final: bool = False  # another attempt would fail the same way
    finish_reason: str | None = None
    request_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Unavailable(Exception):
    """The server rejects every request (quota used up, or not reachable): stop, and resume later."""


class RateLimiter:
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
        config: sampling settings, and the seconds to wait for an answer.
        requests_per_minute, tokens_per_minute: upper limits on what is sent.

    The key is read from `OPENAI_API_KEY`; it is neither stored nor logged. Local servers need none.

    Attributes:
        capabilities: what is known of the server, by model; set by `probe`, corrected by `ask`.
    """

    def __init__(
        self,
        base_url: str | None,
        config: SynthesisConfig,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or ("not-needed" if base_url else None)
        if key is None:
            raise InputError("no base_url and no OPENAI_API_KEY in the environment; set one of them")
        self.base_url = base_url
        self.config = config
        self.capabilities: dict[str, ServerCapabilities] = {}
        self._requests, self._tokens = RateLimiter(requests_per_minute), RateLimiter(tokens_per_minute)
        self.openai = openai.AsyncOpenAI(
            api_key=key, base_url=base_url, max_retries=0, timeout=config.timeout, http_client=_http_client()
        )

    async def close(self) -> None:
        await self.openai.close()

    async def probe(self, model: str, report: Callable[[Call, Answer], Awaitable[None]]) -> None:
        """Find the strictest response format (JSON schema, JSON mode, plain text) that the server truly follows.

        A server that ignores `response_format` answers the question in prose; one that supports it returns JSON.
        `report` is awaited with each question and its answer.

        Raises:
            Unavailable: the server does not answer.
        """
        messages = [{"role": "user", "content": "What is the capital of France? (json)"}]
        try:
            for response_format in RESPONSE_FORMATS[:-1]:
                self.capabilities[model] = replace(self.capabilities_of(model), response_format=response_format)
                answer_model = Capital if response_format == "json_schema" else None
                call = Call(f"probe-{model}-{response_format}", model, messages, answer_model, (30, 30))
                answer = await self.ask(call, _PROBE_TRIES)
                if answer.final and not answer.finish_reason:
                    raise Unavailable(f"{self._address}: {answer.error}")
                await report(call, answer)
                # `ask` may have gone on to a weaker format.
                if self.capabilities[model].response_format == response_format and _is_json(answer, answer_model):
                    return
            self.capabilities[model] = replace(self.capabilities[model], response_format=RESPONSE_FORMATS[-1])
        except BaseException:
            self.capabilities.pop(model, None)  # discard a partial probe
            raise

    def capabilities_of(self, model: str) -> ServerCapabilities:
        return self.capabilities.get(model, ServerCapabilities())

    async def ask(self, call: Call, tries: int = MAX_TRIES) -> Answer:
        """Make a call until it is answered, at most `tries` times.

        Returns:
            The answer, with an `error` if it has no text to use or did not come (`store` lists the errors).

        Raises:
            InputError: wrong key, model or address.
            Unavailable: the account's quota is used up, or the server asks for a very long wait.
        """
        expected = sum(call.expected_tokens)
        error = ""
        for attempt in range(1, tries + 1):
            wait = max(self._requests.reserve(1), self._tokens.reserve(expected))
            if wait:
                await asyncio.sleep(wait)
            delay = min(FIRST_DELAY * 2 ** (attempt - 1), LONGEST_DELAY) * random.uniform(1, 1.25)
            capabilities = self.capabilities_of(call.model)
            try:
                # `post` instead of `chat.completions.create`: the same request without half its processor time.
                completion = await self.openai.post(
                    "/chat/completions",
                    cast_to=ChatCompletion,
                    body=capabilities.body(call, self.config),
                    options={"headers": {"X-Client-Request-Id": call.id.encode("ascii", "replace").decode()}},
                )
                answer = read_completion(completion)
                self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - expected)
                return answer
            except openai.APIStatusError as failure:
                status, error = failure.status_code, f"http {failure.status_code}: {self._redact(failure.message)}"
                self._raise_if_unusable(failure)
                if status in (400, 422) and self._adapt(call.model, capabilities, f"{failure.body} {error}"):
                    continue
                if status not in _RETRYABLE and status < 500:
                    return Answer(error=error, final=True, request_id=failure.request_id)
                delay = max(delay, _retry_after(failure.response.headers))
            except openai.APIConnectionError as failure:
                cause = failure.__cause__ or failure
                timed_out = isinstance(failure, openai.APITimeoutError) and "Connect" not in type(cause).__name__
                error = (
                    f"timeout: {self.config.timeout:g} s" if timed_out else f"connection: {self._redact(str(cause))}"
                )
            except (openai.APIError, ValueError) as failure:  # a body that is no JSON, or no chat completion
                error = f"body: {self._redact(str(failure))}"
            if delay > LONGEST_WAIT:
                raise Unavailable(f"the server asks to wait {delay / 60:.0f} minutes ({error})")
            if attempt < tries:
                await asyncio.sleep(delay)
        return Answer(error=f"{error} ({tries} tries)", final=True)

    @property
    def _address(self) -> str:
        return self.base_url or "the OpenAI API"

    def _redact(self, message: str) -> str:
        """Shorten a server's message to one line and remove the key, which some servers echo."""
        return _short(message.replace(self.openai.api_key, "***"))

    def _raise_if_unusable(self, failure: openai.APIStatusError) -> None:
        """Raise for an error that every request would meet."""
        status, message = failure.status_code, self._redact(failure.message)
        if status in (401, 403, 404):
            raise InputError(f"{self._address} says {status}: {message}; check key, model and base_url")
        if status == 402 or failure.code == "insufficient_quota":
            raise Unavailable(f"the account's quota is used up ({message})")

    def _adapt(self, model: str, used: ServerCapabilities, message: str) -> bool:
        """Leave out what an error message refuses; False if it refuses no parameter."""
        if self.capabilities_of(model) != used:
            return True  # another request got the same message first
        if (changed := used.without(message)) is None:
            return False
        self.capabilities[model] = changed
        return True


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


def _http_client() -> Any:
    """Return the aiohttp client if it is installed: the default's connection pool slows down with its size."""
    try:
        return openai.DefaultAioHttpClient()
    except RuntimeError:
        return None


def _is_json(answer: Answer, answer_model: type[BaseModel] | None) -> bool:
    if answer.error:
        return False
    if answer_model is None:
        return answer.text.lstrip().startswith("{")
    try:
        parse_answer(answer.text, answer_model)
    except ParseError:
        return False
    return True


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
