"""The paper's step on one CUDA device: Mistral-7B's shape, LoRA r 16, bf16, 2048 triplets of realistic lengths.

    python examples/benchmarks/gpu_step.py --output docs/benchmarks/gpu_step.json

Weights are random, as speed does not depend on them. Printed are tokens per second, the share of the device's measured
matrix-product rate (useful operations only: 4 x parameters x tokens of text), peak memory, seconds per step and the
hours of the paper's 880 steps; then the same without each economy in turn.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from step_common import LORA_TARGETS, save_result
from transformers import MistralConfig, MistralModel

from hf_e5.data.collator import E5DataCollator
from hf_e5.modeling import elementwise, packed
from hf_e5.modeling.encoder import E5Model
from hf_e5.training.arguments import E5TrainingArguments
from hf_e5.training.gradcache import ContrastiveStep


PAPER_STEPS = 880
INSTRUCTION_TOKENS = 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look; the rest is Mistral-7B-v0.1")
    parser.add_argument("--mini_batch_num_tokens", type=int, default=16384)
    parser.add_argument("--without", nargs="*", default=["kept graphs", "fused layers", "compiling", "packing"])
    parser.add_argument("--output", help="write the result as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_step.py needs a CUDA device")
    torch.manual_seed(0)
    with torch.device("cuda"):
        backbone = MistralModel(MistralConfig(num_hidden_layers=args.layers, dtype=torch.bfloat16)).bfloat16()
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_TARGETS)
    tokenizer: Any = SimpleNamespace(padding_side="right")  # the rows are token ids already
    model = E5Model(get_peft_model(backbone, lora), tokenizer).train()
    num_parameters = sum(parameter.numel() for parameter in backbone.layers.parameters())
    batch = E5DataCollator()(make_rows(args.triplets, backbone.config.vocab_size))
    batch = {key: value.cuda() for key, value in batch.items()}
    tokens = int(batch["lengths"].sum())
    rate = matrix_product_rate()
    print(
        f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bf16 matrix products; {tokens} tokens of text"
    )

    results = {}
    for left_out in ("nothing", *args.without):
        with economies_without(left_out):
            seconds, peak = measure(model, batch, args.mini_batch_num_tokens, keep=left_out != "kept graphs")
        results[left_out] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "share_of_rate": 4 * num_parameters * tokens / seconds / rate,
            "peak_memory_gb": peak,
            "paper_run_hours": PAPER_STEPS * seconds / 3600,
        }
        result = results[left_out]
        print(
            f"without {left_out}: {seconds:.1f} s, {result['tokens_per_second']:.0f} tokens/s, "
            f"{result['share_of_rate']:.0%} of the rate, peak {peak:.1f} GB, "
            f"{result['paper_run_hours']:.1f} h for {PAPER_STEPS} steps",
            flush=True,
        )
    save_result(args.output, {"triplets": args.triplets, "tokens": tokens, "rate": rate, "without": results})


def measure(model: E5Model, batch: dict, budget: int, keep: bool) -> tuple[float, float]:
    """Seconds and peak memory (GB) of the second step; the first one compiles and measures graphs."""
    settings = E5TrainingArguments(
        output_dir=tempfile.gettempdir(),
        mini_batch_num_tokens=budget,
        keep_graph_num_tokens="auto" if keep else "0",
    )
    step = ContrastiveStep(model, settings, Accelerator())
    seconds = 0.0
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 1e9


@contextmanager
def economies_without(left_out: str) -> Iterator[None]:
    changes = {
        "fused layers": lambda: mock.patch.object(packed, "FUSABLE", set()),
        "packing": lambda: mock.patch.object(packed, "PACKABLE", set()),
        "compiling": lambda: mock.patch.object(elementwise, "COMPILE_FROM", 2**62),
    }
    if left_out not in changes:
        yield
        return
    with changes[left_out]():
        yield


def matrix_product_rate(size: int = 8192) -> float:
    """Operations per second of a large bf16 matrix product."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def make_rows(count: int, vocabulary: int) -> list[dict]:
    """Queries of an instruction and a log-normal body (median 18), documents of the paper's length slots."""
    generator = random.Random(0)

    def text(length: float) -> list[int]:
        return [generator.randrange(3, vocabulary) for _ in range(max(1, min(512, int(length))))]

    def document() -> list[int]:
        return text(1.35 * generator.choice([50, 100, 200, 300, 400, 500]) * generator.lognormvariate(0, 0.2))

    prompts = [text(INSTRUCTION_TOKENS) for _ in range(max(1, count // 3))]  # 150k instructions for 500k examples
    return [
        {
            "query_ids": generator.choice(prompts) + text(generator.lognormvariate(2.9, 0.6)),
            "query_prefix_length": INSTRUCTION_TOKENS,
            "positive_ids": document(),
            "negative_ids": [document()],
        }
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
