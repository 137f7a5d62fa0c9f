"""The pool of brainstormed tasks of a two-step type (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .plan import Plan, Request, Task
from .store import AnswerStore


_FRUITLESS_ROUNDS = 3


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
            key = " ".join(text.casefold().split()).strip(" .!")
            if key and key not in self._seen:
                self._seen.add(key)
                self.tasks.append(Task(" ".join(text.split()), domain))
