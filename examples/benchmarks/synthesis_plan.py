"""The plan of 500,000 examples: memory from the first to the last, shares, and whether one seed plans the same twice.

    python examples/benchmarks/synthesis_plan.py --examples 500000

Everything but the network runs: the plan, the prompts, parsing, the store with its fsyncs, and a restart that reads
the whole log. Answers come from a stand-in for the server in the same process. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from hf_e5.synthesis.client import Answer
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.cost import Budget
from hf_e5.synthesis.executors.online import OnlineExecutor
from hf_e5.synthesis.plan import Plan, Task
from hf_e5.synthesis.run import SynthesisRun
from hf_e5.synthesis.store import AnswerStore


class Instant:
    """Answers every call at once, with text of its own."""

    def __init__(self) -> None:
        self.rng = random.Random(0)

    async def ask(self, call) -> Answer:
        keys = list(call.answer_model.model_fields)
        text = f"{self.rng.getrandbits(64):x} " + "word " * 60
        values = {
            key: [f"Find {self.rng.getrandbits(64):x}." for _ in range(20)] if key == "tasks" else text for key in keys
        }
        return Answer(text=json.dumps(values), prompt_tokens=200, completion_tokens=200)


def memory(kind: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process in MB."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


async def run(plan: Plan, folder: Path, limit: int | None) -> AnswerStore:
    store = AnswerStore(folder)
    await OnlineExecutor(SynthesisRun(plan, store, Budget(store), limit), Instant(), concurrency=256).run()
    store.close()
    return store


def digest(plan: Plan, limit: int) -> str:
    """Hash the first requests with their prompts."""
    tasks = [Task(f"Find {number}.", "law") for number in range(1000)]
    lines = hashlib.sha256()
    for position in plan.positions(limit):
        request = plan.example(position, tasks if plan.config.task_types[position.task_type].brainstorm else None)
        lines.update(repr((request, plan.call(request).messages)).encode())
    return lines.hexdigest()[:16]


def show_shares(size: int) -> None:
    plan = Plan(load_config({"num_examples": size, "models": ["m"]}))
    types: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for position in plan.positions():
        types[position.task_type] += 1
        languages[position.language] += 1
    weights = plan.config.mixture
    type_error = max(abs(types[n] / size / (w / sum(weights.values())) - 1) for n, w in weights.items())
    total = sum(plan.config.languages.values())
    language_error = max(abs(languages[c] / size / (w / total) - 1) for c, w in plan.config.languages.items())
    print(
        f"shares at {size}: a type is off its target by at most {type_error:.2%}, a language by {language_error:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500_000)
    args = parser.parse_args()
    show_shares(100_000)
    config = load_config({"num_examples": args.examples, "models": ["m"]})
    same = len({digest(Plan(config, seed=5), 20_000) for _ in range(2)}) == 1
    print(f"two plans with one seed: {'the same' if same else 'DIFFERENT'} (20,000 requests with their prompts)")
    print(f"memory before the first answer: {memory('VmRSS'):.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        for share in (0.1, 1.0):
            limit = round(args.examples * share)
            store = asyncio.run(run(Plan(config), Path(folder), limit))
            print(
                f"after {store.examples:,} examples: {memory('VmRSS'):.0f} MB, peak {memory('VmHWM'):.0f} MB "
                f"({len(store.done) / (time.monotonic() - start):.0f} requests/s)"
            )
            del store
        asyncio.run(run(Plan(config), Path(folder), None))
        print(f"after a restart that read it all: peak {memory('VmHWM'):.0f} MB")


if __name__ == "__main__":
    main()
