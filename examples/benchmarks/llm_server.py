"""A local OpenAI-compatible server that answers like a model and, if asked to, fails in every way a server can.

    python examples/benchmarks/llm_server.py --port 8123 --latency 0.2 --faults 0.05

Errors (429 with retry-after, 500, 503) and the judgement of the client come from llmock; this file adds answers that
differ from one another and the faults of the wire and of the model. Each fault hits `--faults` of the requests.
`GET /_stats` counts what was served and shows llmock's verdict on the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from llmock.chaos import ChaosSettings
from llmock.journal import Journal
from llmock.middleware import LLMockMiddleware, StreamAborted, install_log_filter
from llmock.state import LLMockState
from llmock.verdict import judge


WIRE_FAULTS = ("hang", "disconnect", "not_json")  # no answer arrives
MODEL_FAULTS = ("malformed", "truncated", "wrong_schema")  # an answer that cannot be used, but is paid for
ANSWER_KEYS = ("user_query", "positive_document", "hard_negative_document", "input_text", "label", "misleading_label")
ANSWER_KEYS += ("input", "S1", "S2", "S3")
WORDS = [
    a + b + c for a in ("ba", "ke", "li", "mo", "ru") for b in ("dan", "fel", "gor", "nis") for c in ("", "a", "um")
]


class Model:
    """The ASGI application behind llmock: one answer per request, after a log-normal wait."""

    def __init__(self, faults: float, latency: float, spread: float, seed: int) -> None:
        self.faults = faults
        self.latency = latency
        self.spread = spread
        self.rng = random.Random(seed)
        self.served: Counter[str] = Counter()  # usable answers by the client's id of the request
        self.outcomes: Counter[str] = Counter()
        self.state = LLMockState(
            ChaosSettings(error_rates=dict.fromkeys((429, 500, 503), faults) if faults else {}).validated(),
        )
        self.state.journal = Journal(1_000_000)  # the constructor takes an empty journal for none

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/_stats":
            return await self._stats(send)
        request = json.loads((await receive())["body"])
        if self.latency:
            await asyncio.sleep(
                self.latency * self.rng.lognormvariate(0, self.spread) if self.spread else self.latency
            )
        fault = self._draw_fault()
        headers = dict(scope["headers"])
        text = self._answer(request, fault)
        if fault == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.outcomes[fault] += 1
            raise StreamAborted(fault)
        body = json.dumps(self._completion(request, text)).encode()
        if fault == "not_json":
            body = b"<html>upstream error</html>"
        content_type = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": content_type})
        if fault == "disconnect":
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            self.outcomes[fault] += 1
            raise StreamAborted(fault)
        self.outcomes[fault or "good"] += 1
        if fault is None:
            self.served[headers.get(b"x-client-request-id", b"").decode()] += 1
        await send({"type": "http.response.body", "body": body})

    def _draw_fault(self) -> str | None:
        draw = self.rng.random() / self.faults if self.faults else 99
        names = (*WIRE_FAULTS, *MODEL_FAULTS)
        return names[int(draw)] if draw < len(names) else None

    def _answer(self, request: dict, fault: str | None) -> str:
        form = request.get("response_format", {}).get("json_schema", {}).get("schema", {})
        prompt = request["messages"][-1]["content"]
        keys = list(form.get("properties") or [key for key in ANSWER_KEYS if f'"{key}"' in prompt])
        if keys == ["tasks"] or not keys:
            answer: object = [f"Given {self._text(3)}, retrieve {self._text(5)}." for _ in range(20)]
            answer = {"tasks": answer} if keys or '"tasks"' in prompt else answer
        else:
            answer = {key: self._text(30) for key in keys}
        text = json.dumps(answer)
        if fault == "malformed":
            return text.replace('":', '"', 1).replace("[", "", 1)
        if fault == "truncated":
            return text[: len(text) * 2 // 3] if keys != ["tasks"] else text[:12]
        if fault == "wrong_schema":
            return json.dumps({"properties": {key: {"type": "string"} for key in keys}, "type": "object"})
        return text

    def _text(self, words: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=words))

    def _completion(self, request: dict, text: str) -> dict:
        prompt_tokens = len(json.dumps(request["messages"])) // 4
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(text) // 4}
        return {
            "id": f"chatcmpl-{self.rng.getrandbits(96):024x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }

    async def _stats(self, send) -> None:
        records = self.state.journal.records(wait=2.0)
        verdict = judge(record for record in records if record.path.endswith("/chat/completions"))
        stats = {
            "requests": len(records),
            "statuses": Counter(str(record.status) for record in records),
            "outcomes": self.outcomes,
            "served": self.served,
            "verdict": {"passed": verdict.passed, "errors": len(verdict.errors), "warnings": len(verdict.warnings)},
            "findings": [finding.to_dict() for finding in verdict.findings[:5]],
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(stats).encode()})


@contextmanager
def running_server(**options: float) -> Iterator[str]:
    """Run the server in a process of its own; yields its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--{name}={value}" for name, value in {"port": port, **options}.items()]
    process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *arguments])
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                stats(url + "/v1")
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield url + "/v1"
    finally:
        process.terminate()
        process.wait()


def stats(base_url: str) -> dict:
    """Return what the server has served so far."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/_stats", timeout=60) as response:
        return json.load(response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that each fault hits")
    parser.add_argument("--latency", type=float, default=0.0, help="median seconds per answer")
    parser.add_argument("--spread", type=float, default=0.0, help="sigma of the log-normal latency")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)  # llmock draws its errors from the global generator
    model = Model(args.faults, args.latency, args.spread, args.seed)
    install_log_filter()
    judged = LLMockMiddleware(model, model.state)

    async def app(scope, receive, send) -> None:
        await (model if scope["path"] == "/_stats" else judged)(scope, receive, send)

    uvicorn.run(app, port=args.port, log_level="critical", lifespan="off", backlog=4096)


if __name__ == "__main__":
    main()
