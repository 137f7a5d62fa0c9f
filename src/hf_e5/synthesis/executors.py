"""The executors turn a stream of requests into answers: one by one, or through the OpenAI Batch API.

The Batch API takes half the price and up to a day. Requests are uploaded in files of up to `REQUESTS_PER_BATCH`, one
model each, and collected when the server has worked them off; what failed goes into the next file. The run may be
stopped while it waits: the next one collects.

`batches.jsonl` in the folder says which batches are under way: one line when a batch is about to be made, one when the
server has taken it, one when its answers are in the store. The requests of an open batch lie in `batches/NAME.jsonl`.
A batch that was made just before a crash is found again by its name in the server's list, so none is paid twice.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from ..errors import InputError
from ..records import read_rows
from .client import MAX_TRIES, Answer, ChatClient, Unavailable, read_completion
from .plan import Request
from .run import Job


_PAUSE = 0.05  # seconds between two looks for a request that waits for answers under way
REQUESTS_PER_BATCH = 10_000  # OpenAI takes 50,000 and 200 MB; smaller files keep memory flat
MAX_OPEN_BATCHES = 20
_FINISHED = {"completed", "expired", "cancelled", "failed"}
_NAME_KEY = "hf_e5_batch"


class OnlineExecutor:
    """Works off requests with at most `concurrency` of them under way."""

    def __init__(self, job: Job, client: ChatClient, concurrency: int) -> None:
        self.job = job
        self.client = client
        self.concurrency = concurrency

    async def work_off(self, requests: Iterator[Request | None]) -> None:
        """Answer every request of the stream (`Job.requests`)."""
        workers = [asyncio.create_task(self._work(requests)) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        except Exception as error:
            self.job.budget.stop(str(error), failed=True)
            # The others bring home what is paid for.
            await asyncio.gather(*workers, return_exceptions=True)
            raise

    async def _work(self, requests: Iterator[Request | None]) -> None:
        # All workers draw from one iterator: nothing is queued, whatever the size of the plan.
        for request in requests:
            if request is None:
                await asyncio.sleep(_PAUSE)
            else:
                await self._answer(request)

    async def _answer(self, request: Request) -> None:
        """Ask until the request is done, or the budget closes."""
        attempt, last = self.job.attempts(request)
        done = False
        while not done and await self.job.budget.has_room():
            call = self.job.call(request, attempt)
            expected = sum(call.expected_tokens), self.job.expected_usd(call)
            self.job.budget.start(*expected)
            try:
                answer = await self.client.ask(call)
                done = await self.job.keep(request, attempt, last, answer)
            finally:
                self.job.budget.finish(*expected)
            attempt += 1


@dataclass
class _Batch:
    name: str
    requests: dict[str, tuple[Request, int]]  # by id: the request and the number of the attempt
    tokens: float
    usd: float
    id: str | None = None


class BatchExecutor:
    """Works off requests in batches; looks after them every `poll_seconds`."""

    def __init__(self, job: Job, client: ChatClient, poll_seconds: float = 30.0) -> None:
        self.job = job
        self.client = client
        self.api = client.openai.with_options(max_retries=MAX_TRIES)
        self.poll_seconds = poll_seconds
        self.folder = job.store.folder / "batches"
        self.folder.mkdir(exist_ok=True)
        self._log = job.store.folder / "batches.jsonl"
        self._again: list[tuple[Request, int]] = []  # to be asked once more
        self._under_way: set[str] = set()
        self._open = [self._restore(row) for row in self._open_rows()]

    async def work_off(self, requests: Iterator[Request | None]) -> None:
        """Answer every request of the stream (`Job.requests`); returns early when the user interrupts."""
        try:
            for batch in self._open:
                if batch.id is None:
                    batch.id = await self._find(batch.name)
                if batch.id is None:
                    await self._send(batch)
            while True:
                while len(self._open) < MAX_OPEN_BATCHES and (made := self._next_batch(requests)):
                    self._open.append(made)
                    await self._send(made)
                if not self._open or not (await self._collect_finished() or await self._wait()):
                    return
        except openai.NotFoundError as error:
            raise InputError(f"--mode batch: this server has no Batch API ({error})") from None
        except openai.APIError as error:
            raise Unavailable(f"Batch API: {error}") from None

    async def _collect_finished(self) -> bool:
        """Collect what is ready; False if nothing is."""
        before = len(self._open)
        for batch in list(self._open):
            status = await self.api.batches.retrieve(batch.id or "")
            if status.status in _FINISHED:
                await self._collect(batch, status)
        return len(self._open) < before

    async def _wait(self) -> bool:
        """Sleep until the next look; False as soon as the user interrupts."""
        counts = sum(len(batch.requests) for batch in self._open)
        self.job.progress.set_postfix_str(f"waiting for {len(self._open)} batches with {counts} requests")
        for _ in range(max(1, round(self.poll_seconds / 0.5))):
            if self.job.budget.interrupted:
                return False
            await asyncio.sleep(min(0.5, self.poll_seconds))
        return True

    def _next_batch(self, requests: Iterator[Request | None]) -> _Batch | None:
        """Take the next requests of one model off the stream, as far as it goes by now, and note them on disk."""
        batch = _Batch(f"{self.job.plan.seed}-{uuid.uuid4().hex[:12]}", {}, 0, 0)
        model = None
        others: list[tuple[Request, int]] = []
        while len(batch.requests) < REQUESTS_PER_BATCH and len(others) < REQUESTS_PER_BATCH:
            if not self.job.budget.is_open() or self.job.budget.is_full():
                break
            if self._again:
                request, attempt = self._again.pop()
            elif (planned := next(requests, None)) is None:
                break
            elif planned.id in self._under_way:
                continue
            else:
                request, attempt = planned, self.job.attempts(planned)[0]
            model = model or request.model
            if request.model != model:
                others.append((request, attempt))
                continue
            self._add(batch, request, attempt)
        self._again.extend(others)
        if not batch.requests:
            return None
        rows = [{**asdict(request), "attempt": attempt} for request, attempt in batch.requests.values()]
        path = self.folder / f"{batch.name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        self._note(batch.name, "made")
        return batch

    def _add(self, batch: _Batch, request: Request, attempt: int) -> None:
        call = self.job.call(request, attempt)
        tokens, usd = sum(call.expected_tokens), self.job.expected_usd(call)
        self.job.budget.start(tokens, usd)
        batch.requests[request.id] = request, attempt
        batch.tokens += tokens
        batch.usd += usd
        self._under_way.add(request.id)

    async def _send(self, batch: _Batch) -> None:
        lines = []
        for request, attempt in batch.requests.values():
            body = self.client.dialect(request.model).body(self.job.call(request, attempt), self.job.config)
            line = {"custom_id": request.id, "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
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
        self._note(batch.name, "sent", batch_id=created.id)

    async def _find(self, name: str) -> str | None:
        """Return the id of the batch of that name on the server, if there is one."""
        page = await self.api.batches.list(limit=100)
        return next((batch.id for batch in page.data if (batch.metadata or {}).get(_NAME_KEY) == name), None)

    async def _collect(self, batch: _Batch, status: Any) -> None:
        """Take over the answers of a finished batch, and queue what needs another attempt."""
        answers: dict[str, Answer] = {}
        for file_id in filter(None, (status.output_file_id, status.error_file_id)):
            content = await self.api.files.content(file_id)
            answers.update(_read_answer(json.loads(line)) for line in content.text.splitlines() if line.strip())
        if status.status == "failed" and not answers:
            errors = [error.message for error in (status.errors.data if status.errors else None) or []]
            self.job.budget.stop(f"batch {batch.id} was refused: {'; '.join(map(str, errors))}", failed=True)
        else:
            await asyncio.gather(
                *(self._keep(*entry, answers.get(key, _missing(status))) for key, entry in batch.requests.items())
            )
        self.job.budget.finish(batch.tokens, batch.usd, len(batch.requests))
        # What is asked once more stays under way: the stream may still come to it.
        self._under_way.difference_update(key for key in batch.requests if key in self.job.store.done)
        self._open.remove(batch)
        self._note(batch.name, "collected")
        (self.folder / f"{batch.name}.jsonl").unlink()

    async def _keep(self, request: Request, attempt: int, answer: Answer) -> None:
        # A crash in the middle of collecting left some of these answers in the store already.
        kept = self.job.store.attempts.get(request.id, 0) >= attempt or request.id in self.job.store.done
        if not kept and not await self.job.keep(request, attempt, self.job.attempts(request)[1], answer):
            self._again.append((request, attempt + 1))

    def _note(self, name: str, event: str, **more: str) -> None:
        with open(self._log, "a", encoding="utf-8") as log:
            log.write(json.dumps({"name": name, "event": event, **more}) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def _open_rows(self) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for row in read_rows(self._log) if self._log.exists() else ():
            rows[row["name"]] = {**rows.get(row["name"], {}), **row}
        return [row for row in rows.values() if row["event"] != "collected"]

    def _restore(self, row: dict[str, Any]) -> _Batch:
        batch = _Batch(row["name"], {}, 0, 0, row.get("batch_id"))
        for saved in read_rows(self.folder / f"{row['name']}.jsonl"):
            attempt = saved.pop("attempt")
            self._add(batch, Request(**saved), attempt)
        return batch


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


def _missing(status: Any) -> Answer:
    return Answer(error=f"batch {status.status}: no answer came")
