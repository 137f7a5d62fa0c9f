"""The folder of a run: the log `answers.jsonl`, and `records.jsonl` and `failures.jsonl`, which are derived from it.

One line of `answers.jsonl` per answer, written once and never changed:

    id                  the request: "{seed}-{task_type}-{index}", "{seed}-{task_type}-tasks-{index}" for a brainstorm,
                        "probe-..." for the questions that test a server's capabilities
    kind                "example", "brainstorm" or "probe"
    task_type, language, document_language, model    as planned; a brainstorm has no language, a probe no type either
    attempt             1, 2, ...: which answer to this request it is
    final               true: the request is done; false: another attempt follows
    error               null, or why the answer cannot be used ("json: ...", "schema: ...", "length: ...",
                        "empty: ...", "refusal: ...") or did not come ("http 503: ...", "connection: ...",
                        "timeout: ...", "body: ...")
    prompt_tokens, completion_tokens    as the server counted them, 0 if no answer came
    cost                USD, null if the model has no price
    request_id, finish_reason           as the server gave them
    record | tasks | raw                an example in the columns of `records.jsonl`, a brainstormed list, or the raw
                                        text of an answer that has an error

So tokens and cost per model, type or language are sums over its lines, failed answers and probes included.
`failures.jsonl` has one line for each request whose last answer has an error.

An answer counts once its line is on the disk (fsync). Answers that arrive together share one fsync.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import whole_file
from ..records import ANSWERS_FILE, FAILURES_FILE, RECORDS_FILE, RUN_FILE, read_json, read_rows


try:
    import fcntl
except ImportError:  # Windows: no guard against two runs in one folder
    fcntl = None  # type: ignore[assignment]


class AnswerStore:
    """The answers of one run, and what they add up to. One writer at a time per folder.

    Args:
        folder: made if missing.
        identity: what must not change between the runs in one folder (`run.json`).

    Attributes:
        done: ids of requests that need no further answer.
        failed: kinds of the requests whose last answer has an error and is final, by id.
        attempts: answers so far of requests that had a failed answer.
        tasks: brainstormed lists by request id.
        examples, prompt_tokens, completion_tokens, usd: totals of the whole log.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        self.tasks: dict[str, list[str]] = {}
        self.examples = self.prompt_tokens = self.completion_tokens = 0
        self.usd = 0.0
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._log = open(self.folder / ANSWERS_FILE, "a+b")
        try:
            self._lock()
            self._check_identity(identity)
            _repair_tail(self.folder / ANSWERS_FILE)
            for row in read_rows(self.folder / ANSWERS_FILE):
                self._count(row)
            self.write_views()
            self._views = [open(self.folder / name, "ab") for name in (RECORDS_FILE, FAILURES_FILE)]
        except BaseException:
            self._log.close()
            raise

    @property
    def tokens(self) -> int:
        """All tokens paid for."""
        return self.prompt_tokens + self.completion_tokens

    async def append(self, row: dict[str, Any]) -> None:
        """Write one answer; returns when it is on the disk."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await asyncio.shield(done)

    async def _flush(self) -> None:
        """Write what waits, again and again until nothing does: answers that come during one fsync share the next."""
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, [row for row, _ in group])
            except OSError as error:
                for _, done in group:
                    done.set_exception(error)
                return
            for row, done in group:
                self._count(row)
                done.set_result(None)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._log.write(b"".join(_line(row) for row in rows))
        self._log.flush()
        os.fsync(self._log.fileno())
        records, failures = self._views
        records.write(b"".join(_line(row["record"]) for row in rows if row.get("record")))
        failures.write(b"".join(_line(_failure(row)) for row in rows if row["final"] and row["error"]))
        records.flush()
        failures.flush()

    def _count(self, row: dict[str, Any]) -> None:
        request_id = row["id"]
        self.prompt_tokens += row["prompt_tokens"]
        self.completion_tokens += row["completion_tokens"]
        self.usd += row["cost"] or 0.0
        if row["error"]:
            self.attempts[request_id] = row["attempt"]
        else:
            self.attempts.pop(request_id, None)
            self.failed.pop(request_id, None)
        if row["final"]:
            self.done.add(request_id)
            if row["error"]:
                self.failed[request_id] = row["kind"]
        if row.get("record"):
            self.examples += 1
        if row.get("tasks"):
            self.tasks[request_id] = row["tasks"]

    def reopen_failures(self) -> int:
        """Mark failed examples as not done, so that they are asked for again. Returns how many.

        Brainstorms stay failed: others have taken their place in the pool, whose order must not change.
        """
        again = [request_id for request_id, kind in self.failed.items() if kind == "example"]
        for request_id in again:
            self.done.remove(request_id)
            del self.failed[request_id]
        return len(again)

    def next_attempt(self, request_id: str) -> int:
        """Return the number of the next attempt at a request, from 1."""
        return self.attempts.get(request_id, 0) + 1

    def write_views(self) -> None:
        """Write `records.jsonl` and `failures.jsonl` anew from the log, each whole or not at all."""
        with whole_file(self.folder / RECORDS_FILE) as records, whole_file(self.folder / FAILURES_FILE) as failures:
            for row in read_rows(self.folder / ANSWERS_FILE):
                if row.get("record"):
                    records.write(_line(row["record"]))
                elif row["error"] and row["final"] and self.attempts.get(row["id"]) == row["attempt"]:
                    failures.write(_line(_failure(row)))

    async def drain(self) -> None:
        """Write what still waits."""
        if self._flusher is not None:
            await self._flusher

    def close(self) -> None:
        """Leave the folder with complete views."""
        for view in self._views:
            view.close()
        self.write_views()
        self._log.close()

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.folder}: another run is writing here; choose another folder") from None

    def _check_identity(self, identity: dict[str, Any] | None) -> None:
        path = self.folder / RUN_FILE
        if path.exists():
            before = read_json(path)
            if identity and (changed := [key for key in identity if identity[key] != before.get(key)]):
                raise InputError(
                    f"{self.folder}: was begun with another {changed[0]} ({before.get(changed[0])}, now "
                    f"{identity[changed[0]]}); choose another folder"
                )
        elif identity:
            with whole_file(path, "w") as file:
                file.write(json.dumps(identity, indent=2) + "\n")


def _repair_tail(path: Path) -> None:
    """Repair a last line that a crash cut: complete JSON gets its line end, an incomplete line is removed."""
    with open(path, "r+b") as file:
        last = b"\n"
        for last in file:  # noqa: B007
            pass
        if last.endswith(b"\n"):
            return
        try:
            json.loads(last)
            file.write(b"\n")
        except ValueError:
            file.truncate(file.tell() - len(last))


def _failure(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("id", "kind", "task_type", "model", "error", "raw", "attempt", "request_id", "finish_reason")
    return {("reason" if key == "error" else key): row.get(key) for key in keys}


def _line(row: dict[str, Any]) -> bytes:
    # Models write lone surrogates now and then; they are no valid UTF-8.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
