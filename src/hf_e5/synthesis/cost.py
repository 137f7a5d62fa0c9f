"""What answers cost, what a plan will cost, and when to stop spending.

Prices are USD per million input and output tokens, from `resources/prices.tsv` or the configuration. The file holds
the list prices its authors last knew; they change, so check them before you spend.
"""

from __future__ import annotations

import asyncio
import csv
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import islice

from .plan import Plan, Task
from .store import AnswerStore


BATCH_DISCOUNT = 0.5  # the OpenAI Batch API bills half
Prices = dict[str, tuple[float, float]]
_SAMPLE = 500  # requests that are rendered to measure prompts
MAX_FAILURES_IN_A_ROW = 100


@cache
def listed_prices() -> Prices:
    """Return (input, output) USD per million tokens by model name."""
    text = files("hf_e5.synthesis").joinpath("resources/prices.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {row["model"]: (float(row["input"]), float(row["output"])) for row in rows}


def find_price(model: str, own: Prices | None = None) -> tuple[float, float] | None:
    """Return a model's price, or None if it has none; a dated name ("gpt-4o-2024-08-06") has that of its family."""
    if own and model in own:
        return own[model]
    families = [name for name in listed_prices() if model == name or model.startswith(f"{name}-20")]
    return listed_prices()[max(families, key=len)] if families else None


def cost_of(price: tuple[float, float] | None, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Return USD, or None without a price."""
    return None if price is None else (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


def describe_plan(plan: Plan, max_examples: int | None = None) -> str:
    """Return the plan as text: counts by type and language, calls, tokens and cost (estimates)."""
    config = plan.config
    num_tasks = plan.num_tasks(max_examples)
    types: Counter[str] = Counter()
    for position in plan.positions(max_examples):
        types[position.task_type] += 1
    total = sum(types.values())
    lines = [f"{total:,} examples (seed {plan.seed}, shard {plan.shard[0]}/{plan.shard[1]})", ""]
    for name, count in types.items():
        tasks = f", {num_tasks[name]:,} brainstormed tasks" if name in num_tasks else ""
        lines.append(f"  {name:<14}{count:>9,}  {count / total:6.1%}{tasks}")

    weights = config.languages
    top = sorted(weights, key=lambda code: -weights[code])
    shares = [f"{config.language_name(code)} {weights[code] / sum(weights.values()):.1%}" for code in top[:15]]
    more = f", and {len(top) - 15} more" if len(top) > 15 else ""
    lines += ["", f"{len(top)} languages: {', '.join(shares)}{more}", ""]

    calls, prompt, answer, usd, unpriced = _totals(plan, types, num_tasks, max_examples)
    lines.append(f"{calls:,} calls, about {prompt / 1e6:,.2f}M tokens in and {answer / 1e6:,.2f}M out")
    if unpriced:
        lines.append(f"no price known for {', '.join(sorted(unpriced))}; add `prices` to the configuration")
    else:
        lines.append(f"about ${usd:,.2f}, or ${usd * BATCH_DISCOUNT:,.2f} with --mode batch")
    return "\n".join(lines)


def _totals(
    plan: Plan, types: Counter[str], num_tasks: dict[str, int], max_examples: int | None
) -> tuple[int, float, float, float, set[str]]:
    """Return calls, prompt tokens, answer tokens, USD and models without a price, scaled up from a sample."""
    config = plan.config
    shares = {model: weight / sum(config.models.values()) for model, weight in config.models.items()}
    stand_in = [Task("Given a question about a field, retrieve documents that answer the question.", "science")]
    sizes: dict[str, list[tuple[int, int]]] = {}
    for position in islice(plan.positions(max_examples), _SAMPLE):
        two_step = position.task_type in num_tasks
        request = plan.example(position, stand_in if two_step else None)
        sizes.setdefault(position.task_type, []).append(plan.expected_tokens(request, plan.messages(request)))
    groups = [(types[name], sizes.get(name) or [(300, config.task_types[name].output_tokens)]) for name in types]
    for name, tasks in num_tasks.items():
        brainstorm = config.task_types[name].brainstorm
        request = plan.brainstorm(name, 0)
        calls = -(-tasks // brainstorm.num_tasks) if brainstorm else 0
        groups.append((calls, [plan.expected_tokens(request, plan.messages(request))]))

    calls = sum(count for count, _ in groups)
    prompt, answer = (
        sum(count * sum(size[side] for size in sample) / len(sample) for count, sample in groups) for side in (0, 1)
    )
    prices = {model: find_price(model, config.prices) for model in shares}
    usd = sum(share * (cost_of(prices[model], prompt, answer) or 0.0) for model, share in shares.items())
    return calls, prompt, answer, usd, {model for model, price in prices.items() if price is None}


@dataclass
class Budget:
    """What may be spent in a folder, over all its runs.

    Calls under way are counted at their expected size, so that a limit is passed by one answer at most, or so.

    Attributes:
        reason: why no further request may start; None while the run goes on.
        failed: the reason is a fault, not a limit or a wish.
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
        """Tell whether what is under way may use up what is left: then it must come home before more starts."""
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
        """Count calls as under way, at what they are expected to take."""
        self._tokens_under_way += tokens
        self._usd_under_way += usd
        self._calls_under_way += calls

    def finish(self, tokens: float, usd: float, calls: int = 1) -> None:
        """Take back what `start` counted: the store has the true numbers by now."""
        self.start(-tokens, -usd, -calls)

    def note(self, error: str | None) -> None:
        """Watch for a server that fails every request: it would spend the budget on nothing."""
        self._failures_in_a_row = self._failures_in_a_row + 1 if error else 0
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.stop(f"the last {MAX_FAILURES_IN_A_ROW} answers failed, the last one: {error}", failed=True)
