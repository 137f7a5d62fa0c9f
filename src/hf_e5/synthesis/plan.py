"""The plan: which requests are made, in which order, fixed by the configuration and the seed alone.

Nothing of the plan is stored: position `i` is computed when it is needed, so that 500,000 examples cost no memory.

* Task types are interleaved evenly: the j-th of n examples of a type stands at (j + 1/2) / n of the plan, so that
  every prefix holds the types in their shares.
* Languages follow a lattice: position i has rank `stride * i + offset mod N`, a permutation of 0..N-1 whose every
  stretch is spread evenly, so that shares are exact to one example for the whole plan and close for every prefix.
* All else is drawn from a generator that is seeded with the request's id.
* A shard of n takes every n-th position and brainstorms its own tasks.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from pydantic import BaseModel

from .config import SynthesisConfig
from .taxonomy import TaskList


@dataclass(frozen=True)
class Request:
    """One thing to ask a model for: a list of tasks (`instruction` is None), or one example.

    Languages are ISO codes; `placeholders` are the values drawn for it.
    """

    id: str
    task_type: str
    model: str
    placeholders: dict[str, str]
    instruction: str | None = None
    language: str | None = None
    document_language: str | None = None


class Task(NamedTuple):
    """A brainstormed task and the domain that seeded it."""

    instruction: str
    domain: str


class Position(NamedTuple):
    """A place in the plan: its number, the task type, the index within the type, and that within type and shard."""

    number: int
    task_type: str
    type_index: int
    shard_index: int


class Plan:
    """All requests of a run.

    Args:
        config: what to generate.
        seed: two plans with one configuration and seed are the same.
        shard: `(i, n)`: the i-th of n disjoint parts.
    """

    def __init__(self, config: SynthesisConfig, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> None:
        self.config = config
        self.seed = seed
        self.shard = shard
        self.counts = apportion(config.mixture, config.num_examples)
        self._languages = _Draw(config.languages)
        self._document_languages = _Draw(config.document_languages)
        self._models = _Draw(config.models)
        self._stride = _lattice_stride(config.num_examples)
        self._offset = random.Random(f"{seed}:languages").randrange(config.num_examples)

    def positions(self, limit: int | None = None) -> Iterator[Position]:
        """Yield this shard's places in order, at most `limit`."""
        number, of = self.shard
        shard_counts = dict.fromkeys(self.counts, 0)
        merged = heapq.merge(*(_spread(name, count, order) for order, (name, count) in enumerate(self.counts.items())))
        taken = 0
        for index, (_, _, type_index, name) in enumerate(merged):
            if index % of != number:
                continue
            if taken == limit:
                return
            yield Position(index, name, type_index, shard_counts[name])
            shard_counts[name] += 1
            taken += 1

    def example_id(self, position: Position) -> str:
        return f"{self.seed}-{position.task_type}-{position.type_index:06d}"

    def task_index(self, position: Position) -> int:
        """Return which task of its type's pool an example of a two-step type takes."""
        return position.shard_index // self.config.examples_per_task

    def example(self, position: Position, tasks: list[Task] | None = None) -> Request:
        """Return the request at a position. Two-step types take their instruction and domain from `tasks`."""
        task = self.config.task_types[position.task_type]
        request_id = self.example_id(position)
        rng = random.Random(request_id)
        rank = (self._stride * position.number + self._offset) % self.config.num_examples
        language = document_language = self._languages.at((rank + 0.5) / self.config.num_examples)
        if task.bilingual:
            document_language = self._other_language(language, rng)
        if tasks:
            # A pool that came out short is gone through again: every task then carries a few more examples.
            instruction, domain = tasks[self.task_index(position) % len(tasks)]
        else:
            instruction, domain = task.instruction or "", rng.choice(self.config.domains)
        values = {name: _draw(weights, rng) for name, weights in task.placeholders.items()}
        return Request(
            id=request_id,
            task_type=position.task_type,
            model=self._models.at(rng.random()),
            placeholders={"domain": domain, **values},
            instruction=instruction,
            language=language,
            document_language=document_language,
        )

    def brainstorm(self, task_type: str, number: int) -> Request:
        """Return the `number`-th request for tasks of a two-step type."""
        index = number * self.shard[1] + self.shard[0]
        # Every domain is visited once before any comes again, in an order of its own for each type.
        domains = list(self.config.domains)
        random.Random(f"{self.seed}:{task_type}:domains").shuffle(domains)
        request_id = f"{self.seed}-{task_type}-tasks-{index:05d}"
        model = self._models.at(random.Random(request_id).random())
        return Request(request_id, task_type, model, {"domain": domains[index % len(domains)]})

    def answer_model(self, request: Request) -> type[BaseModel]:
        """Return the pydantic model of the answer to a request."""
        return TaskList if request.instruction is None else self.config.task_types[request.task_type].answer_model

    def messages(self, request: Request) -> list[dict[str, str]]:
        """Return the chat of a request; every request is a new chat."""
        task = self.config.task_types[request.task_type]
        if request.instruction is None:
            brainstorm = task.brainstorm
            assert brainstorm is not None
            rng = random.Random(f"{request.id}:examples")
            shown = rng.sample(brainstorm.examples, min(brainstorm.num_shown, len(brainstorm.examples)))
            values: dict[str, Any] = {**request.placeholders, "examples": shown, "num_tasks": brainstorm.num_tasks}
            content = self.config.render(brainstorm.template, **values)
        else:
            names = {
                "language": self.config.language_name(request.language or ""),
                "document_language": self.config.language_name(request.document_language or ""),
            }
            values = {**request.placeholders, **names, "instruction": request.instruction, "fields": task.fields}
            content = self.config.render(task.template, **values)
        system = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        return [*system, {"role": "user", "content": content}]

    def expected_tokens(self, request: Request, messages: list[dict[str, str]]) -> tuple[int, int]:
        """Estimate the tokens of prompt (four characters each) and answer."""
        task = self.config.task_types[request.task_type]
        answer = 25 * task.brainstorm.num_tasks if request.instruction is None and task.brainstorm else 0
        return sum(len(message["content"]) for message in messages) // 4 + 8, answer or task.output_tokens

    def num_tasks(self, limit: int | None = None) -> dict[str, int]:
        """Return how many brainstormed tasks the first `limit` examples of this shard need, by two-step type."""
        examples = dict.fromkeys(self.counts, 0)
        for position in self.positions(limit):
            examples[position.task_type] = position.shard_index + 1
        return {
            name: math.ceil(count / self.config.examples_per_task)
            for name, count in examples.items()
            if count and self.config.task_types[name].brainstorm
        }

    def _other_language(self, language: str, rng: random.Random) -> str:
        while (other := self._document_languages.at(rng.random())) == language:
            if self._document_languages.only == language:
                # The documents' one language was drawn for the query too: turn the pair round.
                return self._languages.other_than(language, rng)
        return other


class _Draw:
    """Values by weight, addressed by a number in [0, 1)."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = {value: weight for value, weight in weights.items() if weight > 0}
        self._values = list(self.weights)
        self._bounds = list(accumulate(self.weights.values()))

    @property
    def only(self) -> str | None:
        return self._values[0] if len(self._values) == 1 else None

    def at(self, quantile: float) -> str:
        return self._values[min(bisect(self._bounds, quantile * self._bounds[-1]), len(self._values) - 1)]

    def other_than(self, value: str, rng: random.Random) -> str:
        others = {other: weight for other, weight in self.weights.items() if other != value}
        return _draw(others, rng)


def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """Split `total` by weights into whole numbers with that sum (largest remainders)."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    rest = sorted(weights, key=lambda name: counts[name] - weights[name] * scale)
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _lattice_stride(size: int) -> int:
    """Return a stride that visits all of `size` ranks and spreads every stretch evenly.

    It shares no factor with `size`, and the continued fraction of size / stride has small terms only. The search is
    near e - 2, which falls into step with the spacing of no task type.
    """
    middle, reach = round(size * (math.e - 2)), min(300, size // 10)
    candidates = [n for n in range(max(1, middle - reach), middle + reach + 1) if math.gcd(n, size) == 1]
    return min(candidates, key=lambda n: _largest_term(size, n), default=1)


def _largest_term(a: int, b: int) -> int:
    largest = 0
    while b:
        largest = max(largest, a // b)
        a, b = b, a % b
    return largest


def _spread(name: str, count: int, order: int) -> Iterator[tuple[float, int, int, str]]:
    for index in range(count):
        yield (index + 0.5) / count, order, index, name


def _draw(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
