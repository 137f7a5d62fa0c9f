"""One run of a plan into a folder: which requests come next, and where their answers go.

The requests are a lazy stream, which an executor (`executors/`) turns into answers. Plan and answers fix which
requests it holds; their order also depends on when the answers come. A run that was stopped at any moment goes through
the stream again and skips what is done.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from ..records import fold
from .answers import answer_row
from .capabilities import Call
from .client import Answer
from .cost import Budget, PriceList
from .plan import Plan, Position, Request, Task
from .store import AnswerStore


# How many places of the plan a type may be ahead of one that waits for its tasks, so that a run stopped by its budget
# still has the task types in about their planned shares.
_LARGEST_LEAD = 2000
_MAX_ROUNDS_WITHOUT_PROGRESS = 3


class SynthesisRun:
    """What the executors share.

    Args:
        plan: the requests.
        store: the answers.
        budget: when to stop.
        max_examples: work on this many of the plan's first examples only.
        price_factor: what is billed of the models' prices (`PriceList`).

    Attributes:
        num_examples: how many examples this run aims at, those of earlier runs included.
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
        self.store = store
        self.budget = budget
        self.max_examples = max_examples
        self.prices = PriceList(plan.config.prices, price_factor)
        self.num_examples = sum(plan.num_examples(max_examples).values())
        wanted = plan.num_tasks(max_examples)
        self.pools = {name: TaskPool(plan, store, name, number) for name, number in wanted.items()}
        # A terminal gets a line that is redrawn, a log file a line every half minute.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.progress = tqdm(
            total=self.num_examples, unit="request", dynamic_ncols=True, mininterval=interval, maxinterval=2 * interval
        )

    def requests(self) -> Iterator[Request | None]:
        """Yield what is not done: brainstorms first, then examples in the plan's order as soon as their task is known.

        None means that what is left depends on answers under way. Ends with the plan, or when the budget closes.
        """
        brainstorms = [pool.requests() for pool in self.pools.values()]
        # Each type in its own order: one that waits for its tasks does not hold up the others.
        examples = {name: self.plan.positions(self.max_examples, name) for name in self.plan.counts}
        heads = {name: next(positions, None) for name, positions in examples.items()}
        while (left := list(filter(None, heads.values()))) and self.budget.is_open():
            if request := next(filter(None, (next(pool, None) for pool in brainstorms)), None):
                self.progress.total += 1
                if request.id in self.store.done:
                    self.progress.update()
                else:
                    yield request
            elif position := self._first_ready(left):
                heads[position.task_type] = next(examples[position.task_type], None)
                pool = self.pools.get(position.task_type)
                if self.plan.example_id(position) in self.store.done:
                    self.progress.update()
                elif pool is None or pool.tasks:
                    yield self.plan.example(position, pool.tasks if pool else None)
            else:
                yield None

    def close(self) -> None:
        """End the run; it has failed if a type got no tasks, so that its examples were left out."""
        self.progress.close()
        if empty := [name for name, pool in self.pools.items() if pool.complete and not pool.tasks]:
            self.budget.stop(f"no task could be brainstormed for {', '.join(empty)}; see failures.jsonl", failed=True)

    def _first_ready(self, heads: list[Position]) -> Position | None:
        """Return the first place whose task is known, unless others must catch up."""
        first = min(filter(self._is_ready, heads), default=None)
        return None if first is None or first.number - min(heads).number > _LARGEST_LEAD else first

    def _is_ready(self, position: Position) -> bool:
        pool = self.pools.get(position.task_type)
        return pool is None or pool.complete or self.plan.task_index(position) < len(pool.tasks)

    async def record(self, request: Request, attempt: int, answer: Answer) -> None:
        """Write the answer to a request to the store."""
        row = await self._append(request, attempt, answer, self.prices)
        self.budget.record_failure(row["error"])
        if row["final"]:
            self.progress.update()
        self.progress.set_postfix_str(
            f"{self.store.examples} examples, {len(self.store.failed)} failed, ${self.store.usd:.2f}", refresh=False
        )

    async def record_probe(self, call: Call, answer: Answer) -> None:
        """Write the answer to a probe to the store; a probe is never part of a batch."""
        request = Request("probe", call.id, "", call.model, {})
        await self._append(request, call.attempt, answer, PriceList(self.plan.config.prices))

    async def _append(self, request: Request, attempt: int, answer: Answer, prices: PriceList) -> dict[str, Any]:
        cost = prices.cost(request.model, answer.prompt_tokens, answer.completion_tokens)
        row = answer_row(request, attempt, answer, self.plan.config, cost)
        await self.store.append(row)
        return row


class TaskPool:
    """Tasks in the order of the requests for them, whatever the order in which the answers come.

    So the n-th task is known as soon as the requests up to its own are answered, and a resumed run gets the same pool.

    Args:
        plan, store: the requests and their answers.
        task_type: a two-step type.
        wanted: how many tasks the examples need.

    Attributes:
        tasks: those known so far; more are only added at the end.
        complete: no more will come; there are fewer than wanted if the model repeats itself.
    """

    def __init__(self, plan: Plan, store: AnswerStore, task_type: str, wanted: int) -> None:
        self.plan = plan
        self.store = store
        self.task_type = task_type
        self.wanted = wanted
        self.tasks: list[Task] = []
        self.complete = False
        self._seen: set[str] = set()

    def requests(self) -> Iterator[Request | None]:
        """Yield the brainstorms that fill the pool; None while the next one depends on answers still to come."""
        brainstorm = self.plan.config.task_types[self.task_type].brainstorm
        assert brainstorm is not None
        asked = rounds_without_progress = 0
        # A model may only repeat itself: then fewer tasks must do.
        while len(self.tasks) < self.wanted and rounds_without_progress < _MAX_ROUNDS_WITHOUT_PROGRESS:
            before = len(self.tasks)
            number = math.ceil((self.wanted - before) / brainstorm.num_tasks)
            requests = [self.plan.brainstorm(self.task_type, asked + index) for index in range(number)]
            yield from requests
            for request in requests:
                while request.id not in self.store.done:
                    yield None
                self.add(self.store.tasks.get(request.id, []), request.placeholders["domain"])
            asked += number
            rounds_without_progress = rounds_without_progress + 1 if len(self.tasks) - before < number else 0
        self.complete = True

    def add(self, instructions: list[str], domain: str) -> None:
        """Add a brainstormed list, without tasks that differ from known ones only in case, spaces or full stop."""
        for text in instructions:
            key = fold(text).strip(" .!")
            if key and key not in self._seen:
                self._seen.add(key)
                self.tasks.append(Task(" ".join(text.split()), domain))
