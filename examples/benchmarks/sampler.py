"""Time the plan of one epoch for 2 million rows in 20 tasks on 8 ranks, with and without repeated texts.

python examples/benchmarks/sampler.py
"""

import time

import numpy as np

from hf_e5.data.sampler import TaskBatchSampler


ROWS, TASKS, BATCH, RANKS = 2_000_000, 20, 256, 8

rng = np.random.default_rng(0)
tasks = rng.integers(0, TASKS, ROWS)
unique = np.arange(ROWS)
TEXTS = {
    "no texts given": None,
    "all texts differ": np.stack([unique, ROWS + unique], axis=1),
    "4 questions per passage, negatives shared": np.stack(
        [unique, ROWS + rng.integers(0, ROWS // 4, ROWS), 2 * ROWS + rng.integers(0, ROWS // 2, ROWS)], axis=1
    ),
    "50 labels (repeats cannot be avoided)": np.stack([unique, ROWS + rng.integers(0, 50, ROWS)], axis=1),
}


def meetings(plan: list[np.ndarray], texts: np.ndarray | None) -> int:
    """How often a text meets itself in a batch."""
    if texts is None:
        return 0
    return sum(texts[batch].size - len(np.unique(texts[batch])) for batch in plan)


print(f"{ROWS} rows, {TASKS} tasks, {RANKS} ranks x {BATCH}")
for name, texts in TEXTS.items():
    start = time.perf_counter()
    sampler = TaskBatchSampler(tasks, BATCH, texts=texts, world_size=RANKS)
    built = time.perf_counter()
    plan = sampler.plan(0)
    planned = time.perf_counter()
    before = meetings(TaskBatchSampler(tasks, BATCH, world_size=RANKS).plan(0), texts)
    print(
        f"{name}: set-up {built - start:.1f} s, plan {planned - built:.1f} s, {len(plan)} batches, "
        f"repeated texts {meetings(plan, texts)} (random batches: {before})"
    )
