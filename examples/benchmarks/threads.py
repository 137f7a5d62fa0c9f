"""How OpenMP threads should wait: a training step alone and beside a busy process, with threads that spin or sleep.

    python examples/benchmarks/threads.py

Every setting runs in a process of its own, alone and then beside one that keeps a core busy. Prints a markdown table;
seconds are medians over the steps after the first one. Needs a machine on which nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time


SETTINGS = {
    "default (spins)": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE (sleeps)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def main(rows: int, steps: int, limit: float) -> None:
    print("| setting | alone, s | beside a busy process, s |\n|---|---|---|")
    for name, variables in SETTINGS.items():
        alone = run_child(variables, rows, steps, limit)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            beside = run_child(variables, rows, steps, limit)
            neighbour.kill()
        print(f"| {name} | {alone} | {beside} |", flush=True)


def run_child(variables: dict[str, str], rows: int, steps: int, limit: float) -> str:
    """Seconds of a step in a process with these variables, or that it took longer than `limit` in all."""
    command = [sys.executable, __file__, "--rows", str(rows), "--steps", str(steps), "--child"]
    try:
        result = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        return f"over {limit / (steps + 1):.0f}"
    return result.stdout.splitlines()[-1]


def time_steps(rows: int, steps: int) -> float:
    """Median seconds of the training step on `rows` triplets of the sample, SmolLM2-135M with LoRA, bf16."""
    from accelerate import Accelerator
    from datasets import Dataset
    from step_common import SAMPLE, default_model, load_model, read_rows

    from hf_e5 import E5DataCollator, E5TrainingArguments
    from hf_e5.data.tokenization import tokenize_dataset
    from hf_e5.training.gradcache import ContrastiveStep

    model = load_model(default_model())
    dataset = Dataset.from_list(read_rows(SAMPLE, rows))
    tokenized = tokenize_dataset(dataset, model.tokenizer, query_max_length=64, passage_max_length=96)
    batch = E5DataCollator()(list(tokenized))
    step = ContrastiveStep(
        model,
        E5TrainingArguments(use_cpu=True).objective(),
        Accelerator(mixed_precision="bf16"),
        mini_batch_num_tokens=4096,
        keep_graph_num_tokens="auto",
    )
    seconds = []
    for _ in range(steps + 1):
        since = time.perf_counter()
        step(batch)
        model.zero_grad()
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="triplets of a step")
    parser.add_argument("--steps", type=int, default=4, help="measured steps")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which a process is given up")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(f"{time_steps(args.rows, args.steps):.2f}")
    else:
        main(args.rows, args.steps, args.limit)
