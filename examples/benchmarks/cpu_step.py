"""A training step on a CPU: how its threads should wait for each other, and in which dtype it should compute.

    python examples/benchmarks/cpu_step.py threads
    python examples/benchmarks/cpu_step.py dtypes

`threads` runs each setting alone and beside a process that keeps a core busy; `dtypes` runs each dtype with all
instructions of the CPU and without AMX. Every run is a process of its own. Prints markdown tables; seconds are medians
over the steps after the first one. Needs a machine on which nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial


WAITING = {
    "default (spins)": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE (sleeps)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
# oneDNN, which multiplies bf16 matrices, then acts as on a CPU without AMX.
INSTRUCTIONS = {"all": {}, "AVX-512 without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}


def compare_waiting(run_child: Callable[..., str]) -> None:
    print("| setting | alone, s | beside a busy process, s |\n|---|---|---|")
    for name, variables in WAITING.items():
        alone = run_child(variables, "bfloat16")
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            beside = run_child(variables, "bfloat16")
            neighbour.kill()
        print(f"| {name} | {alone} | {beside} |", flush=True)


def compare_dtypes(run_child: Callable[..., str]) -> None:
    print("| instructions | bfloat16, s | float32, s |\n|---|---|---|")
    for name, variables in INSTRUCTIONS.items():
        print(f"| {name} | {run_child(variables, 'bfloat16')} | {run_child(variables, 'float32')} |", flush=True)


def run_child(variables: dict[str, str], dtype: str, *, rows: int, steps: int, limit: float) -> str:
    """Seconds of a step in a process with these variables, or that it took longer than `limit` in all."""
    command = [sys.executable, __file__, "child", "--dtype", dtype, "--rows", str(rows), "--steps", str(steps)]
    try:
        result = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        return f"over {limit / (steps + 1):.0f}"
    return result.stdout.splitlines()[-1]


def time_steps(dtype: str, rows: int, steps: int) -> float:
    """Median seconds of the training step on `rows` triplets of the sample, SmolLM2-135M with LoRA."""
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from step_common import SAMPLE, default_model, load_model, read_rows

    from hf_e5 import E5DataCollator, E5TrainingArguments
    from hf_e5.data.tokenization import tokenize_dataset
    from hf_e5.training.gradcache import ContrastiveStep

    model = load_model(default_model(), getattr(torch, dtype))
    dataset = Dataset.from_list(read_rows(SAMPLE, rows))
    tokenized = tokenize_dataset(dataset, model.tokenizer, query_max_length=64, passage_max_length=96)
    batch = E5DataCollator()(list(tokenized))
    step = ContrastiveStep(
        model,
        E5TrainingArguments(use_cpu=True).objective(),
        Accelerator(mixed_precision="bf16" if dtype == "bfloat16" else "no"),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["threads", "dtypes", "child"])
    parser.add_argument("--rows", type=int, default=8, help="triplets of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which a process is given up")
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "child":
        print(f"{time_steps(args.dtype, args.rows, args.steps):.2f}")
    else:
        compare = compare_waiting if args.what == "threads" else compare_dtypes
        compare(partial(run_child, rows=args.rows, steps=args.steps, limit=args.limit))
