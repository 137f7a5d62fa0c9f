"""The client against llmock: it waits as told, repeats what may be repeated, adapts to what a server lacks."""

import asyncio
import json
import socket
import time

import httpx2
import openai
import pytest

from hf_e5.errors import InputError
from hf_e5.synthesis import client as client_module
from hf_e5.synthesis.capabilities import RESPONSE_FORMATS, Call, ServerCapabilities
from hf_e5.synthesis.client import ChatClient, RateLimiter, Unavailable
from hf_e5.synthesis.config import load_config


CONFIG = load_config({"models": ["m"], "timeout": 1})
STS = CONFIG.task_types["sts"].answer_model


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.05)


def call(number=0):
    return Call(f"0-sts-{number}", "m", [{"role": "user", "content": f"Write {number}."}], STS, (10, 10))


def ask(base_url, *calls, config=CONFIG, **options):
    async def main():
        client = ChatClient(base_url, config, **options)
        try:
            return client, await asyncio.gather(*map(client.ask, calls or [call()]))
        finally:
            await client.close()

    return asyncio.run(main())


def scripted(handler):
    """A client whose server is `handler(body) -> (status, body)`."""

    def respond(request):
        status, body = handler(json.loads(request.content))
        return httpx2.Response(status, json=body)

    transport = openai.DefaultAsyncHttpx2Client(transport=httpx2.MockTransport(respond))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "_http_client", lambda: transport)
        return ChatClient("http://server/v1", CONFIG)


def completion(text, **choice):
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
    return 200, {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": usage,
    }


def complain(message):
    return 400, {"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}}


def test_an_answer(llmock):
    _, (answer,) = ask(llmock.base_url())
    assert set(json.loads(answer.text)) == {"S1", "S2", "S3"}  # llmock follows the schema
    assert answer.prompt_tokens > 0 and answer.completion_tokens > 0
    body = llmock.last_request.body
    assert body["temperature"] == body["top_p"] == 1.0
    assert body["response_format"]["json_schema"]["schema"]["additionalProperties"] is False


def test_retry_after_is_honoured(llmock):
    llmock.rate_limit(times=2, retry_after=0.6)
    start = time.monotonic()
    _, (answer,) = ask(llmock.base_url())
    assert answer.error is None
    assert time.monotonic() - start > 1.2
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_passing_errors_are_retried_with_backoff(llmock, status):
    llmock.fail(status, times=4, retry_after=0.01)
    _, (answer,) = ask(llmock.base_url())
    assert answer.error is None
    assert len(llmock.requests) == 5
    llmock.assert_resilient(strict=True)


def test_a_server_that_stays_down_ends_in_an_error(llmock, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.01)
    llmock.fail(503, times=None, retry_after=0.01)
    _, (answer,) = ask(llmock.base_url())
    assert answer.error.startswith("http 503")
    assert answer.final
    assert len(llmock.requests) == client_module.MAX_TRIES
    llmock.assert_resilient()


def test_a_slow_answer_is_a_timeout_and_asked_for_again(llmock):
    llmock.delay(1.5)
    _, (answer,) = ask(llmock.base_url())
    assert answer.error is None
    assert len(llmock.requests) == 2


def test_a_wrong_request_is_not_repeated(llmock):
    llmock.context_overflow()
    _, (answer,) = ask(llmock.base_url())
    assert answer.error.startswith("http 400")
    assert answer.final
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_model_or_address_is_told_at_once(llmock, status):
    llmock.fail(status)
    with pytest.raises(InputError, match=str(status)):
        ask(llmock.base_url())
    assert len(llmock.requests) == 1


def test_a_key_that_the_server_echoes_is_not_told(llmock, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    llmock.fail(401, message="Wrong API key: sk-very-secret")
    with pytest.raises(InputError) as caught:
        ask(llmock.base_url())
    assert "secret" not in str(caught.value)


def test_a_spent_quota_stops(llmock):
    llmock.fail(429, code="insufficient_quota")
    with pytest.raises(Unavailable, match="quota"):
        ask(llmock.base_url())
    assert len(llmock.requests) == 1


def test_a_wait_of_an_hour_stops(llmock):
    llmock.rate_limit(retry_after=3600)
    with pytest.raises(Unavailable, match="60 minutes"):
        ask(llmock.base_url())


def test_a_real_quota_is_respected(llmock):
    llmock.limits(rpm=300)
    client, answers = ask(llmock.base_url(), *map(call, range(20)), requests_per_minute=1200)
    assert all(answer.error is None for answer in answers)
    llmock.assert_resilient()


def test_the_rate_limiter_spreads_requests():
    limiter = RateLimiter(600)
    assert [round(limiter.reserve(1), 2) for _ in range(4)] == [0.0, 0.1, 0.2, 0.3]
    limiter.correct(5)
    assert limiter.reserve(1) == pytest.approx(0.9, abs=0.01)
    assert RateLimiter(None).reserve(10**9) == 0


@pytest.mark.parametrize(
    ("text", "choice", "error"),
    [
        ("", {}, "empty"),
        (None, {"finish_reason": "content_filter"}, "refusal"),
        (None, {"message": {"role": "assistant", "content": None, "refusal": "I won't."}}, "refusal: I won't."),
    ],
)
def test_answers_without_text(text, choice, error):
    answer = asyncio.run(scripted(lambda body: completion(text, **choice)).ask(call()))
    assert answer.error.startswith(error)
    assert answer.prompt_tokens == 5  # paid all the same


def test_a_body_that_is_no_completion_is_asked_for_again():
    replies = iter([(200, {"detail": "warming up"}), completion("{}", finish_reason=None), completion("yes")])
    assert asyncio.run(scripted(lambda body: next(replies)).ask(call())).text == "{}"


def test_parameters_that_a_model_refuses_are_left_out():
    def picky(body):
        for name in ("max_completion_tokens", "temperature", "top_p", "seed"):
            if name in body:
                return complain(f"Unsupported parameter: '{name}' is not supported with this model.")
        return completion("yes")

    client = scripted(picky)
    assert asyncio.run(client.ask(call())).text == "yes"
    left = ServerCapabilities(token_limit="max_tokens", temperature=False, top_p=False, seed=False)
    assert client.capabilities["m"] == left


def test_many_requests_that_get_one_complaint_weaken_the_format_once():
    def no_schema(body):
        if (body.get("response_format") or {}).get("type") == "json_schema":
            return complain("response_format json_schema is not supported")
        return completion("yes")

    async def main():
        client = scripted(no_schema)
        await asyncio.gather(*(client.ask(call(number)) for number in range(10)))
        return client.capabilities["m"].response_format

    assert asyncio.run(main()) == "json_object"


@pytest.mark.parametrize("supported", RESPONSE_FORMATS)
@pytest.mark.parametrize("silent", [False, True])
def test_the_probe_finds_what_a_server_can_do(supported, silent):
    def server(body):
        kind = (body.get("response_format") or {"type": "text"})["type"]
        if RESPONSE_FORMATS.index(kind) < RESPONSE_FORMATS.index(supported):
            return completion("Paris.") if silent else complain(f"response_format {kind} is unknown")
        return completion('{"capital": "Paris"}' if kind != "text" else "Paris")

    kept = []

    async def keep(asked, answer):
        kept.append(answer)

    client = scripted(server)
    asyncio.run(client.probe("m", keep))
    assert client.capabilities["m"].response_format == supported
    assert kept


def test_no_server_is_told_in_a_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"

    async def main():
        client = ChatClient(url, CONFIG)
        try:
            await client.probe("m", None)
        finally:
            await client.close()

    with pytest.raises(Unavailable, match=f"{url}: connection: "):
        asyncio.run(main())


def test_no_key_and_no_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ChatClient(None, CONFIG)


def test_equal_prompts_are_sampled_with_different_seeds():
    bodies = [ServerCapabilities().body(asked, CONFIG) for asked in (call(0), call(1), call(0))]
    assert bodies[0]["seed"] != bodies[1]["seed"]
    assert bodies[0] == bodies[2]
