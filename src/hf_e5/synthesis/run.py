"""One run of a plan into a folder: which requests come next, and how an answer becomes a line of the store.

The requests are a lazy stream, which an executor (`executors.py`) turns into answers. Plan and answers fix which
requests it holds; their order also depends on when the answers come. A run that was stopped at any moment goes through
the stream again and skips what is done.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator
from typing import Any

from tqdm.auto import tqdm

from ..records import fold
from .capabilities import Call
from .client import Answer
from .cost import Budget, cost_of, find_price
from .parsing import ParseError, parse_answer
from .plan import Plan, Position, Request, Task
from .store import AnswerStore
from .taxonomy import TaskList


# How many places of the plan a type may be ahead of one that waits for its tasks: a budget that ends the run finds the
# types in their shares, or nearly so.
_LARGEST_LEAD = 2000
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
        wanted = plan.num_tasks(max_examples)
        self.pools = {name: TaskPool(plan, store, name, number) for name, number in wanted.items()}
        # A line that moves on a terminal, a line every half minute in a log file.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.progress = tqdm(
            total=self.num_examples, unit="request", dynamic_ncols=True, mininterval=interval, maxinterval=2 * interval
        )

    def requests(self) -> Iterator[Request | None]:
        """Yield what is not done: brainstorms first, then examples in the plan's order as soon as their task is known.

        None means that what is left depends on answers under way. Ends with the plan, or when the budget closes.
        """
        brainstorms = [pool.calls() for pool in self.pools.values()]
        examples = {name: self._positions(name) for name in self.plan.counts}
        heads = {name: first for name, positions in examples.items() if (first := next(positions, None))}
        while heads and self.budget.is_open():
            if call := next(filter(None, (next(calls, None) for calls in brainstorms)), None):
                self.progress.total += 1
                if call.id in self.store.done:
                    self.progress.update()
                else:
                    yield call
            elif position := self._first_ready(heads.values()):
                name = position.task_type
                if following := next(examples[name], None):
                    heads[name] = following
                else:
                    del heads[name]
                pool = self.pools.get(name)
                if self.plan.example_id(position) in self.store.done:
                    self.progress.update()
                elif pool is None or pool.tasks:
                    yield self.plan.example(position, pool.tasks if pool else None)
            else:
                yield None

    def close(self) -> None:
        """End the run: say so if the examples of a type had to be left out."""
        self.progress.close()
        if barren := [name for name, pool in self.pools.items() if pool.complete and not pool.tasks]:
            self.budget.stop(f"no task could be brainstormed for {', '.join(barren)}; see failures.jsonl", failed=True)

    @property
    def num_examples(self) -> int:
        """How many examples this run aims at, those of earlier runs included."""
        number, of = self.plan.shard
        whole = len(range(number, self.config.num_examples, of))
        return whole if self.max_examples is None else min(whole, self.max_examples)

    def _positions(self, task_type: str) -> Iterator[Position]:
        # A pass over the plan for each type: one that waits for its tasks holds up no other, and nothing is queued.
        return (position for position in self.plan.positions(self.max_examples) if position.task_type == task_type)

    def _first_ready(self, heads: Collection[Position]) -> Position | None:
        """Return the first place whose task is known, unless others must catch up."""
        first = min(filter(self._is_ready, heads), default=None)
        return None if first is None or first.number - min(heads).number > _LARGEST_LEAD else first

    def _is_ready(self, position: Position) -> bool:
        pool = self.pools.get(position.task_type)
        return pool is None or pool.complete or self.plan.task_index(position) < len(pool.tasks)

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


class TaskPool:
    """Tasks in the order of the calls that asked for them, whatever the order in which the answers come.

    So the n-th task is known as soon as the calls up to its own are answered, and a run that goes on finds the same
    pool again.

    Args:
        plan, store: the requests and their answers.
        task_type: a two-step type.
        wanted: how many tasks the examples need.

    Attributes:
        tasks: what is known so far; more is only ever added at the end.
        complete: no more will come; fewer than wanted if the model repeats itself.
    """

    def __init__(self, plan: Plan, store: AnswerStore, task_type: str, wanted: int) -> None:
        self.plan = plan
        self.store = store
        self.task_type = task_type
        self.wanted = wanted
        self.tasks: list[Task] = []
        self.complete = False
        self._seen: set[str] = set()

    def calls(self) -> Iterator[Request | None]:
        """Yield the calls that fill the pool; None while the next step depends on answers that are still to come."""
        brainstorm = self.plan.config.task_types[self.task_type].brainstorm
        assert brainstorm is not None
        asked = fruitless = 0
        # A model that only repeats itself must not be asked for ever.
        while len(self.tasks) < self.wanted and fruitless < _FRUITLESS_ROUNDS:
            before = len(self.tasks)
            number = math.ceil((self.wanted - before) / brainstorm.num_tasks)
            calls = [self.plan.brainstorm(self.task_type, asked + index) for index in range(number)]
            yield from calls
            for call in calls:
                while call.id not in self.store.done:
                    yield None
                self.add(self.store.tasks.get(call.id, []), call.placeholders["domain"])
            asked += number
            fruitless = fruitless + 1 if len(self.tasks) - before < number else 0
        self.complete = True

    def add(self, instructions: list[str], domain: str) -> None:
        """Add a brainstormed list, without what differs only in case, spaces or full stop from a task of the pool."""
        for text in instructions:
            key = fold(text).strip(" .!")
            if key and key not in self._seen:
                self._seen.add(key)
                self.tasks.append(Task(" ".join(text.split()), domain))
