"""Requests are answered through the OpenAI Batch API, at half the price and within a day.

Requests are uploaded in files of up to `REQUESTS_PER_BATCH`, one model each, and collected when the server has
answered them; failed ones go into the next file. The run may be stopped while it waits: the next one collects.

`batches/NAME.json` in the run's folder holds the requests of a batch from before it is made until its answers are in
the store, and its id as soon as the server has taken it. A batch that was made just before a crash is found again by
its name in the server's list, so none is paid twice.
"""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from ...errors import InputError
from ...files import whole_file
from ..client import MAX_TRIES, Answer, ChatClient, Unavailable, read_completion
from ..plan import Request
from ..run import SynthesisRun


REQUESTS_PER_BATCH = 10_000  # OpenAI takes 50,000 and 200 MB; smaller files take less memory
MAX_OPEN_BATCHES = 20
_FINISHED = {"completed", "expired", "cancelled", "failed"}
_NAME_KEY = "hf_e5_batch"


@dataclass
class _Batch:
    name: str
    id: str | None = None
    requests: dict[str, tuple[Request, int]] = field(default_factory=dict)  # by id: request and number of the attempt
    tokens: float = 0
    usd: float = 0


class BatchExecutor:
    """Answers requests in batches; polls them every `poll_seconds`."""

    def __init__(self, synthesis: SynthesisRun, client: ChatClient, poll_seconds: float = 30.0) -> None:
        self.synthesis = synthesis
        self.client = client
        self.api = client.openai.with_options(max_retries=MAX_TRIES)
        self.poll_seconds = poll_seconds
        self.folder = synthesis.store.folder / "batches"
        self.folder.mkdir(exist_ok=True)
        self._again: list[Request] = []  # taken from the stream, for a later batch
        self._open = [self._restore(path) for path in sorted(self.folder.glob("*.json"))]

    async def run(self) -> None:
        restored = {key for batch in self._open for key in batch.requests}
        requests = (item for item in self.synthesis.requests() if item is None or item.id not in restored)
        try:
            for batch in self._open:
                batch.id = batch.id or await self._find(batch.name)
                if batch.id is None:
                    await self._send(batch)
            while True:
                while len(self._open) < MAX_OPEN_BATCHES and (made := self._next_batch(requests)):
                    self._open.append(made)
                    await self._send(made)
                if not self._open or not (await self._collect_finished() or await self._wait()):
                    return
        except openai.NotFoundError as error:
            raise InputError(f"mode 'batch': this server has no Batch API ({error})") from None
        except openai.APIError as error:
            raise Unavailable(f"Batch API: {error}") from None

    async def _collect_finished(self) -> bool:
        """Collect the batches that are finished; False if none is."""
        before = len(self._open)
        for batch in list(self._open):
            status = await self.api.batches.retrieve(batch.id or "")
            if status.status in _FINISHED:
                await self._collect(batch, status)
        return len(self._open) < before

    async def _wait(self) -> bool:
        """Sleep until the next poll; False as soon as the user interrupts."""
        counts = sum(len(batch.requests) for batch in self._open)
        self.synthesis.progress.set_postfix_str(f"waiting for {len(self._open)} batches with {counts} requests")
        for _ in range(max(1, round(self.poll_seconds / 0.5))):
            if self.synthesis.budget.interrupted:
                return False
            await asyncio.sleep(min(0.5, self.poll_seconds))
        return True

    def _next_batch(self, requests: Iterator[Request | None]) -> _Batch | None:
        """Take the requests of one model that are available now, and write them to disk."""
        batch = _Batch(f"{self.synthesis.plan.seed}-{uuid.uuid4().hex[:12]}")
        budget = self.synthesis.budget
        model = None
        others: list[Request] = []
        while len(batch.requests) < REQUESTS_PER_BATCH and len(others) < REQUESTS_PER_BATCH:
            if not budget.is_open() or budget.is_full():
                break
            request = self._again.pop() if self._again else next(requests, None)
            if request is None:
                break
            model = model or request.model
            if request.model == model:
                self._add(batch, request, self.synthesis.store.next_attempt(request.id))
            else:
                others.append(request)
        self._again.extend(others)
        if not batch.requests:
            return None
        self._save(batch)
        return batch

    def _add(self, batch: _Batch, request: Request, attempt: int) -> None:
        tokens, usd = self.synthesis.prices.expected(self.synthesis.plan.call(request, attempt))
        self.synthesis.budget.start(tokens, usd)
        batch.requests[request.id] = request, attempt
        batch.tokens += tokens
        batch.usd += usd

    async def _send(self, batch: _Batch) -> None:
        lines = []
        for request, attempt in batch.requests.values():
            call = self.synthesis.plan.call(request, attempt)
            body = self.client.capabilities_of(request.model).body(call, self.client.config)
            line = {"custom_id": request.id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.append(json.dumps(line) + "\n")
        content = io.BytesIO("".join(lines).encode())
        file = await self.api.files.create(file=(f"{batch.name}.jsonl", content), purpose="batch")
        # Not retried: a batch that was made while its reply got lost would be paid twice. The next run looks for it.
        created = await self.client.openai.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={_NAME_KEY: batch.name},
        )
        batch.id = created.id
        self._save(batch)

    async def _find(self, name: str) -> str | None:
        """Return the id of the batch of that name on the server, if there is one."""
        page = await self.api.batches.list(limit=100)
        return next((batch.id for batch in page.data if (batch.metadata or {}).get(_NAME_KEY) == name), None)

    async def _collect(self, batch: _Batch, status: Any) -> None:
        """Store the answers of a finished batch, and queue what needs another attempt."""
        answers: dict[str, Answer] = {}
        for file_id in filter(None, (status.output_file_id, status.error_file_id)):
            content = await self.api.files.content(file_id)
            answers.update(_read_answer(json.loads(line)) for line in content.text.splitlines() if line.strip())
        if status.status == "failed" and not answers:
            errors = [error.message for error in (status.errors.data if status.errors else None) or []]
            self.synthesis.budget.stop(f"batch {batch.id} was refused: {'; '.join(map(str, errors))}", failed=True)
        else:
            missing = Answer(error=f"batch {status.status}: no answer came")
            await asyncio.gather(
                *(self._record(*entry, answers.get(key, missing)) for key, entry in batch.requests.items())
            )
        self.synthesis.budget.finish(batch.tokens, batch.usd, len(batch.requests))
        self._remove(batch)

    async def _record(self, request: Request, attempt: int, answer: Answer) -> None:
        # After a crash while a batch was collected, some of its answers are in the store already.
        if request.id not in self.synthesis.store.done and self.synthesis.store.next_attempt(request.id) <= attempt:
            await self.synthesis.record(request, attempt, answer)
        if request.id not in self.synthesis.store.done:
            self._again.append(request)

    def _save(self, batch: _Batch) -> None:
        rows = [{**asdict(request), "attempt": attempt} for request, attempt in batch.requests.values()]
        with whole_file(self.folder / f"{batch.name}.json", "w") as file:
            json.dump({"id": batch.id, "requests": rows}, file)

    def _restore(self, path: Path) -> _Batch:
        saved = json.loads(path.read_text(encoding="utf-8"))
        batch = _Batch(path.stem, saved["id"])
        for row in saved["requests"]:
            attempt = row.pop("attempt")
            self._add(batch, Request(**row), attempt)
        return batch

    def _remove(self, batch: _Batch) -> None:
        self._open.remove(batch)
        (self.folder / f"{batch.name}.json").unlink()


def _read_answer(line: dict[str, Any]) -> tuple[str, Answer]:
    """Turn a line of an output or error file into a request's id and answer."""
    response = line.get("response") or {}
    status, body = response.get("status_code"), response.get("body") or {}
    if status == 200:
        try:
            return line["custom_id"], read_completion(ChatCompletion.construct(**body))
        except ValueError as failure:
            return line["custom_id"], Answer(error=f"body: {failure}")
    error = line.get("error") or body.get("error") or {}
    message = error.get("message") if isinstance(error, dict) else error
    return line["custom_id"], Answer(error=f"http {status}: {message}", request_id=response.get("request_id"))
