"""One run of a plan into a folder: which requests come next, and how an answer becomes a line of the store.

The plan is worked off in rounds: brainstorms until the pools are full, then all examples. A round is a lazy stream of
requests, which an executor (`online`, `batch`) turns into answers. A run that was stopped at any moment goes through
the same rounds again and skips what is done.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from .budget import Budget
from .client import Answer
from .dialect import Call
from .parsing import ParseError, parse_answer
from .plan import Plan, Request, Task, unique_tasks
from .prices import cost_of, find_price
from .store import AnswerStore
from .taxonomy import TaskList


_FRUITLESS_ROUNDS = 3


class Job:
    """What the executors share.

    Args:
        plan: the requests.
        store: the answers.
        budget: when to stop.
        max_examples: work on this many of the plan's first examples only.
        price_factor: 1, or what the Batch API takes of it.
    """

    def __init__(
        self,
        plan: Plan,
        store: AnswerStore,
        budget: Budget,
        max_examples: int | None = None,
        price_factor: float = 1.0,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.store = store
        self.budget = budget
        self.max_examples = max_examples
        self.price_factor = price_factor
        # A line that moves on a terminal, a line every half minute in a log file.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.progress = tqdm(unit="request", dynamic_ncols=True, mininterval=interval, maxinterval=2 * interval)

    def rounds(self) -> Iterator[Iterator[Request]]:
        """Yield streams of requests; each must be worked off before the next is taken."""
        wanted = self.plan.num_tasks(self.max_examples)
        pools: dict[str, list[Task]] = {name: [] for name in wanted}
        asked = dict.fromkeys(wanted, 0)
        fruitless = dict.fromkeys(wanted, 0)
        while True:
            requests = [
                self.plan.brainstorm(name, asked[name] + number)
                for name in wanted
                if fruitless[name] < _FRUITLESS_ROUNDS
                for number in range(self._calls_for(name, wanted[name] - len(pools[name])))
            ]
            if not requests:
                break
            yield self._stream("brainstorm", requests, len(requests))
            if self.budget.reason is not None:
                return
            for name in wanted:
                calls = [request for request in requests if request.task_type == name]
                lists = ((self.store.tasks.get(call.id, []), call.placeholders["domain"]) for call in calls)
                grown = unique_tasks(lists, pools[name])
                # A model that only repeats itself must not be asked for ever.
                fruitless[name] = fruitless[name] + 1 if len(grown) - len(pools[name]) < len(calls) else 0
                asked[name] += len(calls)
                pools[name] = grown
        yield self._stream("examples", self._examples(pools), self.num_examples)
        if barren := [name for name in wanted if not pools[name]]:
            self.budget.stop(f"no task could be brainstormed for {', '.join(barren)}; see failures.jsonl", failed=True)

    @property
    def num_examples(self) -> int:
        """How many examples this run aims at, those of earlier runs included."""
        number, of = self.plan.shard
        whole = len(range(number, self.config.num_examples, of))
        return whole if self.max_examples is None else min(whole, self.max_examples)

    def _calls_for(self, task_type: str, missing: int) -> int:
        brainstorm = self.config.task_types[task_type].brainstorm
        return math.ceil(missing / brainstorm.num_tasks) if brainstorm and missing > 0 else 0

    def _examples(self, pools: dict[str, list[Task]]) -> Iterator[Request]:
        for position in self.plan.positions(self.max_examples):
            tasks = pools.get(position.task_type)
            if self.plan.example_id(position) in self.store.done:
                self.progress.update()
            elif tasks != []:
                yield self.plan.example(position, tasks)

    def _stream(self, name: str, requests: Iterable[Request], total: int) -> Iterator[Request]:
        self.progress.reset(total)
        self.progress.set_description(name)
        return (request for request in requests if request.id not in self.store.done)

    def attempts(self, request: Request) -> tuple[int, int]:
        """Return the number of the next attempt at a request, and of the last one it gets."""
        attempt = self.store.attempts.get(request.id, 0) + 1
        return attempt, max(attempt, self.config.answer_attempts)

    def call(self, request: Request, attempt: int) -> Call:
        """Return the call that asks a model for a request."""
        messages = self.plan.messages(request)
        tokens = self.plan.expected_tokens(request, messages)
        return Call(request.id, request.model, messages, self.plan.answer_model(request), tokens, attempt)

    def expected_usd(self, call: Call) -> float:
        """Estimate what a call costs; 0 without a price."""
        return self._cost(call.model, *call.expected_tokens) or 0.0

    def _cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float | None:
        cost = cost_of(find_price(model, self.config.prices), prompt_tokens, completion_tokens)
        return None if cost is None else cost * self.price_factor

    async def keep(self, request: Request, attempt: int, last: int, answer: Answer) -> bool:
        """Read an answer and write it to the store. Returns True if the request is done."""
        content, error = self._read(request, answer)
        final = error is None or answer.final or attempt >= last
        await self.store.append(
            {
                "id": request.id,
                "task_type": request.task_type,
                "language": request.language,
                "document_language": request.document_language,
                **self._log_line(request.model, attempt, final, error, answer),
                **content,
            }
        )
        self.budget.note(error)
        if final:
            self.progress.update()
        self.progress.set_postfix_str(
            f"{self.store.examples} examples, {len(self.store.failed)} failed, ${self.store.usd:.2f}", refresh=False
        )
        return final

    async def keep_probe(self, call: Call, answer: Answer) -> None:
        """Write what the answer to a probe cost; it is asked online in every mode."""
        usd = self._cost(call.model, answer.prompt_tokens, answer.completion_tokens)
        await self.store.append(
            {
                "id": call.id,
                **dict.fromkeys(("task_type", "language", "document_language")),
                **self._log_line(call.model, call.attempt, True, None, answer),
                "cost": None if usd is None else usd / self.price_factor,
                "raw": answer.text,
            }
        )

    def _log_line(self, model: str, attempt: int, final: bool, error: str | None, answer: Answer) -> dict[str, Any]:
        return {
            "model": model,
            "attempt": attempt,
            "final": final,
            "error": error,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "cost": self._cost(model, answer.prompt_tokens, answer.completion_tokens),
            "request_id": answer.request_id,
            "finish_reason": answer.finish_reason,
        }

    def _read(self, request: Request, answer: Answer) -> tuple[dict[str, Any], str | None]:
        """Return the part of the log line that holds the content, and the error if there is one."""
        raw = {"raw": answer.text}
        if answer.error:
            return raw, answer.error
        # A list that was cut still has whole items; a document that was cut is half a document.
        if answer.finish_reason == "length" and request.instruction is not None:
            return raw, "length: the answer was cut at the token limit"
        try:
            parsed = parse_answer(answer.text, self.plan.answer_model(request))
        except ParseError as error:
            return raw, str(error)
        if isinstance(parsed, TaskList):
            return {"tasks": parsed.tasks}, None
        fields = self.config.task_types[request.task_type].fields
        record = {
            "id": request.id,
            "task_type": request.task_type,
            "language": request.language,
            "document_language": request.document_language,
            "instruction": request.instruction,
            "query": getattr(parsed, fields.query),
            "positive": getattr(parsed, fields.positive),
            "negative": getattr(parsed, fields.negative) if fields.negative else None,
            "placeholders": request.placeholders,
            "model": request.model,
        }
        return {"record": record}, None
