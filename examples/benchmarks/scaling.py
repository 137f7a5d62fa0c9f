"""Time and peak memory of one step against the batch size, at a fixed token budget.

    python examples/benchmarks/scaling.py

The memory must stay flat and the time per text constant. The backbone is a small random decoder, so that the largest
batch takes minutes, not hours; each batch size has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np
import torch
from step_common import peak_memory, run_child, save_result
from transformers import LlamaConfig, LlamaModel

from hf_e5.data.collator import E5DataCollator


VOCABULARY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--mini_batch_num_tokens", type=int, default=4096)
    parser.add_argument("--keep_graph_num_tokens", type=int, default=4096)
    parser.add_argument("--output", help="write the result as JSON")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    options = ["--mini_batch_num_tokens", str(args.mini_batch_num_tokens)]
    options += ["--keep_graph_num_tokens", str(args.keep_graph_num_tokens)]
    results = []
    for size in args.batch_sizes:
        result = run_child(__file__, "--side", str(size), *options)
        results.append({"batch": size, **result})
        print(
            f"batch {size:5d}: {result['cpu_seconds']:7.1f} s of processor time, "
            f"{1e6 * result['cpu_seconds'] / result['tokens']:6.1f} us per token, "
            f"peak memory {result['peak_memory_gb']:.2f} GB",
            flush=True,
        )
    peaks = [result["peak_memory_gb"] for result in results]
    print(f"peak memory of the largest batch is {peaks[-1] / peaks[0]:.2f}x that of the smallest")
    save_result(args.output, {"results": results})


def measure(size: int, args: argparse.Namespace) -> dict:
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from hf_e5.modeling.encoder import E5Model
    from hf_e5.training.gradcache import ContrastiveStep
    from hf_e5.training.objective import ContrastiveObjective

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4
    )
    backbone = get_peft_model(
        LlamaModel(config).bfloat16(), LoraConfig(r=16, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    )
    model = E5Model(backbone, tokenizer=None).train()  # type: ignore[arg-type]  # the rows are token ids already
    step = ContrastiveStep(
        model,
        ContrastiveObjective(temperature=0.02, gather_across_devices=False, mask_duplicates=True),
        Accelerator(),
        mini_batch_num_tokens=args.mini_batch_num_tokens,
        keep_graph_num_tokens=args.keep_graph_num_tokens,
    )
    for seed in range(1, 5):  # matrix libraries keep what they compile for the shapes that training meets
        step(E5DataCollator()(make_rows(64, seed)))
    batch = E5DataCollator()(make_rows(size))
    started = time.process_time()
    step(batch)
    seconds = time.process_time() - started
    return {"cpu_seconds": seconds, "tokens": int(batch["lengths"].sum()), "peak_memory_gb": peak_memory()}


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Random tokens; queries of 20 to 60, documents of the paper's length slots (in words) up to 512 tokens."""
    generator = random.Random(seed)

    def text(length: int) -> np.ndarray:
        return np.array([generator.randrange(VOCABULARY) for _ in range(length)])

    def document() -> np.ndarray:
        words = generator.choice([50, 100, 200, 300, 400, 500])
        return text(min(512, int(1.35 * words * generator.uniform(0.8, 1.2))))

    return [
        {"query_ids": text(generator.randint(20, 60)), "positive_ids": document(), "negative_ids": [document()]}
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
