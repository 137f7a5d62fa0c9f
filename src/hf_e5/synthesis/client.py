"""Talking to an OpenAI-compatible server: pace, retries, and what this server understands.

`ChatClient.ask` sends one request until it is answered. It waits as long as `retry-after` says, backs off with jitter
otherwise, and never repeats a request that the server called wrong. What the server understands is a `Dialect`: probed
once per model, corrected when the server complains.
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
from .capabilities import LADDER, Call, Dialect
from .config import SynthesisConfig
from .parsing import ParseError, parse_answer
from .taxonomy import Text


MAX_TRIES = 8
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds; doubles from one to the other
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left until later
_PROBE_TRIES = 5  # a wrong address should not take a minute to show
_RETRYABLE = {408, 409, 425, 429}  # and every 5xx


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
        config: sampling settings, and the seconds to wait for an answer.
        requests_per_minute, tokens_per_minute: upper limits on what is sent.

    The key is read from `OPENAI_API_KEY`; it is neither stored nor logged. Local servers need none.

    Attributes:
        dialects: what is known of the server, by model; filled by `probe` and by complaints.
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
            raise InputError("no --base_url and no OPENAI_API_KEY in the environment; set one of them")
        self.base_url = base_url
        self.config = config
        self.dialects: dict[str, Dialect] = {}
        self._requests, self._tokens = Pace(requests_per_minute), Pace(tokens_per_minute)
        self.openai = openai.AsyncOpenAI(
            api_key=key, base_url=base_url, max_retries=0, timeout=config.timeout, http_client=_http_client()
        )

    async def close(self) -> None:
        await self.openai.close()

    async def probe(self, model: str, report: Callable[[Call, Answer], Awaitable[None]]) -> None:
        """Find the highest rung of the ladder (JSON schema, JSON mode, plain text) that the server truly follows.

        A server that ignores `response_format` answers the question in prose; one that knows it gives JSON.
        `report` is awaited with each question and its answer.

        Raises:
            Unavailable: the server does not answer.
        """
        try:
            self.dialects[model] = await self._climb_down(model, report)
        except BaseException:
            self.dialects.pop(model, None)  # half a probe is no knowledge
            raise

    async def _climb_down(self, model: str, report: Callable[[Call, Answer], Awaitable[None]]) -> Dialect:
        messages = [{"role": "user", "content": "What is the capital of France? (json)"}]
        for structured in LADDER[:-1]:
            self.dialects[model] = replace(self.dialect(model), structured=structured)
            answer_model = Capital if structured == "json_schema" else None
            call = Call(f"probe-{model}-{structured}", model, messages, answer_model, (30, 30))
            answer = await self.ask(call, _PROBE_TRIES)
            if answer.final and not answer.finish_reason:
                raise Unavailable(f"{self.base_url or 'the OpenAI API'}: {answer.error}")
            await report(call, answer)
            if self.dialect(model).structured == structured and _is_json(answer, structured):
                return self.dialect(model)
        return replace(self.dialect(model), structured=LADDER[-1])

    def dialect(self, model: str) -> Dialect:
        return self.dialects.get(model, Dialect())

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
            dialect = self.dialect(call.model)
            try:
                # `post` instead of `chat.completions.create`: the same request without half its processor time.
                completion = await self.openai.post(
                    "/chat/completions",
                    cast_to=ChatCompletion,
                    body=dialect.body(call, self.config),
                    options={"headers": {"X-Client-Request-Id": call.id.encode("ascii", "replace").decode()}},
                )
                answer = read_completion(completion)
                self._tokens.correct(answer.prompt_tokens + answer.completion_tokens - expected)
                return answer
            except openai.APIStatusError as failure:
                error = f"http {failure.status_code}: {self._tell(failure.message)}"
                self._raise_if_hopeless(failure)
                if failure.status_code in (400, 422) and self._adapt(call.model, dialect, f"{failure.body} {error}"):
                    continue
                if failure.status_code not in _RETRYABLE and failure.status_code < 500:
                    return Answer(error=error, final=True, request_id=failure.request_id)
                delay = max(delay, _retry_after(failure.response.headers))
            except openai.APIConnectionError as failure:
                cause = failure.__cause__ or failure
                timed_out = isinstance(failure, openai.APITimeoutError) and "Connect" not in type(cause).__name__
                error = f"timeout: {self.config.timeout:g} s" if timed_out else f"connection: {self._tell(str(cause))}"
            except (openai.APIError, ValueError) as failure:  # a body that is no JSON, or no chat completion
                error = f"body: {self._tell(str(failure))}"
            if delay > LONGEST_WAIT:
                raise Unavailable(f"the server asks to wait {delay / 60:.0f} minutes ({error})")
            if attempt < tries:
                await asyncio.sleep(delay)
        return Answer(error=f"{error} ({tries} tries)", final=True)

    def _tell(self, message: str) -> str:
        """Shorten a server's message to a line, without the key that some servers echo."""
        return _short(message.replace(self.openai.api_key, "***"))

    def _raise_if_hopeless(self, failure: openai.APIStatusError) -> None:
        """Raise for what concerns every request, not this one."""
        status = failure.status_code
        if status in (401, 403, 404):
            address = self.base_url or "the OpenAI API"
            raise InputError(
                f"{address} says {status}: {self._tell(failure.message)}; check key, --model and --base_url"
            )
        if status == 402 or failure.code == "insufficient_quota":
            raise Unavailable(f"the account's quota is used up ({self._tell(failure.message)})")

    def _adapt(self, model: str, used: Dialect, complaint: str) -> bool:
        """Change the model's dialect after a complaint about a parameter; False if the complaint is about none."""
        if self.dialect(model) != used:
            return True  # another request met the same complaint first
        if (changed := used.after(complaint)) is None:
            return False
        self.dialects[model] = changed
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
