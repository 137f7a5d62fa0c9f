"""What answers cost, what a plan will cost, and when to stop spending.

Prices are USD per million input and output tokens, from `resources/prices.tsv` or the configuration. The file holds
the list prices its authors last knew; they change, so check them before you spend.
"""

from __future__ import annotations

import asyncio
import csv
import math
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import islice
from statistics import fmean

from .capabilities import Call
from .plan import Plan, Task
from .store import AnswerStore


BATCH_DISCOUNT = 0.5  # the OpenAI Batch API bills half
Prices = dict[str, tuple[float, float]]
_SAMPLE = 100  # requests of a type that are rendered to measure prompts
MAX_FAILURES_IN_A_ROW = 100


@cache
def listed_prices() -> Prices:
    """Return (input, output) USD per million tokens by model name."""
    text = files("hf_e5.synthesis").joinpath("resources/prices.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {row["model"]: (float(row["input"]), float(row["output"])) for row in rows}


@dataclass(frozen=True)
class PriceList:
    """What models charge: the user's `own` prices before the listed ones, times `factor` (less than 1 for batches)."""

    own: Prices = field(default_factory=dict)
    factor: float = 1.0

    def find(self, model: str) -> tuple[float, float] | None:
        """Return a model's price, None if it has none; a dated name ("gpt-4o-2024-08-06") has that of its family."""
        if model in self.own:
            return self.own[model]
        families = [name for name in listed_prices() if model == name or model.startswith(f"{name}-20")]
        return listed_prices()[max(families, key=len)] if families else None

    def cost(self, model: str, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return USD, or None without a price."""
        price = self.find(model)
        return price and (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6 * self.factor

    def expected(self, call: Call) -> tuple[int, float]:
        """Estimate the tokens and USD of a call; 0 USD without a price."""
        return sum(call.expected_tokens), self.cost(call.model, *call.expected_tokens) or 0.0


def describe_plan(plan: Plan, max_examples: int | None = None) -> str:
    """Return the plan as text: counts by type and language, calls, tokens and cost (estimates)."""
    config = plan.config
    counts, num_tasks = plan.num_examples(max_examples), plan.num_tasks(max_examples)
    total = sum(counts.values())
    lines = [f"{total:,} examples (seed {plan.seed}, shard {plan.shard[0]}/{plan.shard[1]})", ""]
    for name, count in counts.items():
        tasks = f", {num_tasks[name]:,} brainstormed tasks" if name in num_tasks else ""
        lines.append(f"  {name:<14}{count:>9,}  {count / total:6.1%}{tasks}")

    weights = config.languages
    top = sorted(weights, key=lambda code: -weights[code])
    shares = [f"{config.language_name(code)} {weights[code] / sum(weights.values()):.1%}" for code in top[:15]]
    more = f", and {len(top) - 15} more" if len(top) > 15 else ""
    lines += ["", f"{len(top)} languages: {', '.join(shares)}{more}", ""]

    calls, prompt, answer = _estimate(plan, max_examples)
    lines.append(f"{calls:,} calls, about {prompt / 1e6:,.2f}M tokens in and {answer / 1e6:,.2f}M out")
    prices, models = PriceList(config.prices), config.models
    costs = {model: prices.cost(model, weight * prompt, weight * answer) for model, weight in models.items()}
    if unpriced := sorted(model for model, cost in costs.items() if cost is None):
        lines.append(f"no price known for {', '.join(unpriced)}; add `prices` to the configuration")
    else:
        usd = sum(filter(None, costs.values())) / sum(models.values())
        lines.append(f"about ${usd:,.2f}, or ${usd * BATCH_DISCOUNT:,.2f} through the Batch API")
    return "\n".join(lines)


def _estimate(plan: Plan, max_examples: int | None) -> tuple[int, float, float]:
    """Return the number of calls, prompt tokens and answer tokens, scaled up from a sample of each task type."""
    num_tasks = plan.num_tasks(max_examples)
    stand_in = [Task("Given a question about a field, retrieve documents that answer the question.", "science")]
    groups = []  # a number of calls, and a sample of them
    for name, count in plan.num_examples(max_examples).items():
        tasks = stand_in if name in num_tasks else None
        sample = islice(plan.positions(max_examples, name), _SAMPLE)
        groups.append((count, [plan.call(plan.example(position, tasks)) for position in sample]))
        if brainstorm := plan.config.task_types[name].brainstorm:
            number = math.ceil(num_tasks[name] / brainstorm.num_tasks)
            groups.append((number, [plan.call(plan.brainstorm(name, 0))]))
    prompt, answer = (
        sum(count * fmean(call.expected_tokens[side] for call in sample) for count, sample in groups)
        for side in (0, 1)
    )
    return sum(count for count, _ in groups), prompt, answer


@dataclass
class Budget:
    """What may be spent in a folder, over all its runs.

    Calls under way are counted at their expected size, so a limit is exceeded by about one answer at most.

    Attributes:
        reason: why no further request may start; None while the run goes on.
        failed: the reason is an error, not a limit or the user.
        interrupted: the user wants the run to end soon.
    """

    store: AnswerStore
    max_usd: float | None = None
    max_tokens: int | None = None
    reason: str | None = field(default=None, init=False)
    failed: bool = field(default=False, init=False)
    interrupted: bool = field(default=False, init=False)
    _usd_under_way: float = field(default=0.0, init=False)
    _tokens_under_way: float = field(default=0.0, init=False)
    _calls_under_way: int = field(default=0, init=False)
    _failures_in_a_row: int = field(default=0, init=False)

    def stop(self, reason: str, *, failed: bool = False, interrupted: bool = False) -> None:
        """Let no further request start. The first reason stays."""
        if self.reason is None:
            self.reason, self.failed = reason, failed
        self.interrupted = self.interrupted or interrupted

    def is_open(self) -> bool:
        """Tell whether the run goes on; closes it when a limit is reached."""
        if self.max_usd is not None and self.store.usd >= self.max_usd:
            self.stop(f"max_usd {self.max_usd:g} is reached")
        if self.max_tokens is not None and self.store.tokens >= self.max_tokens:
            self.stop(f"max_tokens {self.max_tokens} is reached")
        return self.reason is None

    def is_full(self) -> bool:
        """Tell whether the calls under way may use up what is left: no more may start until they are answered."""
        return self._calls_under_way > 0 and (
            (self.max_usd is not None and self.store.usd + self._usd_under_way >= self.max_usd)
            or (self.max_tokens is not None and self.store.tokens + self._tokens_under_way >= self.max_tokens)
        )

    async def has_room(self) -> bool:
        """Wait until another call may start; False if the run is to end."""
        while self.is_open() and self.is_full():
            await asyncio.sleep(0.05)
        return self.reason is None

    def start(self, tokens: float, usd: float, calls: int = 1) -> None:
        """Count calls as under way, at the tokens and USD that they are expected to take."""
        self._tokens_under_way += tokens
        self._usd_under_way += usd
        self._calls_under_way += calls

    def finish(self, tokens: float, usd: float, calls: int = 1) -> None:
        """Undo `start`: the store has the true numbers now."""
        self.start(-tokens, -usd, -calls)

    def record_failure(self, error: str | None) -> None:
        """Count failures in a row (None: a success), and stop if there are too many: they only spend the budget."""
        self._failures_in_a_row = self._failures_in_a_row + 1 if error else 0
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.stop(f"the last {MAX_FAILURES_IN_A_ROW} answers failed, the last one: {error}", failed=True)
