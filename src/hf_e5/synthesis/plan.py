"""The plan: which requests are made, in which order, fixed by the configuration and the seed alone.

* Task types: the j-th of n examples of a type stands at (j + 1/2) / n of the plan, so every prefix holds the types in
  their shares.
* Languages: places sorted by `i * golden ratio mod 1` are cut into one stretch per language. Each language has its
  share of the whole plan to one example; and as these fractions fill [0, 1) evenly, nearly so in every prefix, shard
  and task type.
* All else is drawn from a generator that is seeded with the request's id.
* A shard of n takes every n-th place and brainstorms its own tasks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from .capabilities import Call
from .config import SynthesisConfig
from .taxonomy import TaskList


_VERSION = 2  # another version plans other requests for the same configuration and seed
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # of 2**64: integers wrap around where fractions would lose digits


@dataclass(frozen=True)
class Request:
    """One thing to ask a model for: an example of a task type, a list of tasks (`brainstorm`), or a server's probe.

    Languages are ISO codes; `placeholders` are the values drawn for it. Only an example has instruction and languages.
    """

    kind: Literal["example", "brainstorm", "probe"]
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
    """A place in the plan: its number, task type, index within the type, index within type and shard, language."""

    number: int
    task_type: str
    type_index: int
    shard_index: int
    language: str


class Plan:
    """All requests of a run, in 8 bytes per example.

    Args:
        config: what to generate.
        seed: two plans with one configuration and seed are the same.
        shard: `(i, n)`: the i-th of n disjoint parts.

    Attributes:
        counts: number of examples by task type, over all shards.
    """

    def __init__(self, config: SynthesisConfig, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> None:
        self.config = config
        self.seed = seed
        self.shard = shard
        self.counts = apportion(config.mixture, config.num_examples)
        self._types, self._languages = list(self.counts), list(config.languages)
        number, of = shard
        types, indices = _interleave(list(self.counts.values()))
        languages = _spread(apportion(config.languages, config.num_examples), random.Random(f"{seed}:languages"))
        self._type, self._index, self._language = types[number::of], indices[number::of], languages[number::of]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the requests; all runs in one folder have the same."""
        fingerprint = self.config.fingerprint
        return {"plan_version": _VERSION, "configuration": fingerprint, "seed": self.seed, "shard": list(self.shard)}

    def num_examples(self, limit: int | None = None) -> dict[str, int]:
        """Return how many of this shard's first `limit` examples each task type has, if it has any."""
        counts = np.bincount(self._type[:limit], minlength=len(self._types))
        return {name: int(number) for name, number in zip(self._types, counts, strict=True) if number}

    def num_tasks(self, limit: int | None = None) -> dict[str, int]:
        """Return how many brainstormed tasks the first `limit` examples of this shard need, by two-step type."""
        return {
            name: math.ceil(number / self.config.examples_per_task)
            for name, number in self.num_examples(limit).items()
            if self.config.task_types[name].brainstorm
        }

    def positions(self, limit: int | None = None, task_type: str | None = None) -> Iterator[Position]:
        """Yield the first `limit` places of this shard in order, or those of one task type among them."""
        types = self._type[:limit]
        number, of = self.shard
        places = range(len(types)) if task_type is None else np.flatnonzero(types == self._types.index(task_type))
        shard_indices = {name: count() for name in self._types}
        for i in places:
            name, language = self._types[types[i]], self._languages[self._language[i]]
            yield Position(number + int(i) * of, name, int(self._index[i]), next(shard_indices[name]), language)

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
        language = position.language
        if tasks:
            # A pool with too few tasks is used again from the start: each task then serves more examples.
            instruction, domain = tasks[self.task_index(position) % len(tasks)]
        else:
            instruction, domain = task.instruction or "", rng.choice(self.config.domains)
        return Request(
            kind="example",
            id=request_id,
            task_type=position.task_type,
            model=_draw(self.config.models, rng),
            placeholders={"domain": domain} | {name: _draw(values, rng) for name, values in task.placeholders.items()},
            instruction=instruction,
            language=language,
            document_language=self._other_language(language, rng) if task.bilingual else language,
        )

    def brainstorm(self, task_type: str, number: int) -> Request:
        """Return the `number`-th request for tasks of a two-step type."""
        index = number * self.shard[1] + self.shard[0]
        # Every domain is used once before any is used again, in a different order for each type.
        domains = list(self.config.domains)
        random.Random(f"{self.seed}:{task_type}:domains").shuffle(domains)
        request_id = f"{self.seed}-{task_type}-tasks-{index:05d}"
        model = _draw(self.config.models, random.Random(request_id))
        return Request("brainstorm", request_id, task_type, model, {"domain": domains[index % len(domains)]})

    def call(self, request: Request, attempt: int = 1) -> Call:
        """Return the call that makes a request; every call is a new chat."""
        task = self.config.task_types[request.task_type]
        answer_model: type[BaseModel]
        values: dict[str, Any]
        if request.kind == "brainstorm":
            assert task.brainstorm is not None
            template, answer_model = task.brainstorm.template, TaskList
            answer_tokens = 25 * task.brainstorm.num_tasks
            shown = min(task.brainstorm.num_shown, len(task.brainstorm.examples))
            examples = random.Random(f"{request.id}:examples").sample(task.brainstorm.examples, shown)
            values = {"examples": examples, "num_tasks": task.brainstorm.num_tasks}
        else:
            template, answer_model, answer_tokens = task.template, task.answer_model, task.output_tokens
            values = {
                "language": self.config.language_name(request.language or ""),
                "document_language": self.config.language_name(request.document_language or ""),
                "instruction": request.instruction,
                "fields": task.fields,
            }
        content = self.config.render(template, **request.placeholders, **values)
        system = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        messages = [*system, {"role": "user", "content": content}]
        prompt_tokens = sum(len(message["content"]) for message in messages) // 4 + 8  # four characters each
        return Call(request.id, request.model, messages, answer_model, (prompt_tokens, answer_tokens), attempt)

    def _other_language(self, language: str, rng: random.Random) -> str:
        # Where the only document language was drawn for the query, the documents get one of the query languages.
        for weights in (self.config.document_languages, self.config.languages):
            if others := {code: weight for code, weight in weights.items() if weight > 0 and code != language}:
                break
        return _draw(others, rng)


def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """Split `total` by weights into whole numbers with that sum (largest remainders)."""
    scale = total / sum(weights.values())
    counts = {name: int(weight * scale) for name, weight in weights.items()}
    rest = sorted(weights, key=lambda name: counts[name] - weights[name] * scale)
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _interleave(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the type (int16) and the index within the type (int32) of each place; shapes (sum of counts,)."""
    types = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    indices = np.concatenate([np.arange(number, dtype=np.int32) for number in counts])
    order = np.argsort((indices + 0.5) / np.repeat(counts, counts), kind="stable")
    return types[order], indices[order]


def _spread(counts: dict[str, int], rng: random.Random) -> np.ndarray:
    """Return the index of the value at each place (int16), each value at `counts` places that are spread evenly."""
    places = np.arange(sum(counts.values()), dtype=np.uint64)
    values = np.empty(len(places), dtype=np.int16)
    order = np.argsort(places * _GOLDEN_RATIO + np.uint64(rng.getrandbits(64)))
    values[order] = np.repeat(np.arange(len(counts)), list(counts.values()))
    return values


def _draw(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
