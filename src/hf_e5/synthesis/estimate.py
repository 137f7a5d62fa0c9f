"""What a plan holds and what it will cost, before anything is sent (`--dry_run`)."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from .plan import Plan, Task
from .prices import BATCH_DISCOUNT, cost_of, find_price


_SAMPLE = 500  # requests that are rendered to measure prompts


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
