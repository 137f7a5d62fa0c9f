"""The paper's step on one CUDA device: Mistral-7B's shape, LoRA r 16, bf16, 2048 triplets of realistic lengths.

    python examples/benchmarks/gpu_step.py --output docs/benchmarks/gpu_step.json

Weights are random, as speed does not depend on them. Printed are tokens per second, the share of the device's measured
matrix-product rate (useful operations only: 4 x parameters x tokens of text), peak memory, seconds per step and the
hours of the paper's 880 steps. Then, on fewer triplets: sentence-transformers' cached loss on the same token ids, and
our step without each of its economies in turn. The result is written after each of these; one that fails is noted.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from step_common import matrix_product_rate, save_result
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MistralConfig, MistralModel

from hf_e5.data.collator import E5DataCollator
from hf_e5.modeling.encoder import E5Model
from hf_e5.modeling.packed import decoder, fused_ops
from hf_e5.training.gradcache import ContrastiveStep
from hf_e5.training.objective import ContrastiveObjective


PAPER_STEPS = 880
INSTRUCTION_TOKENS = 26
WARM_UP_TRIPLETS = 32
Step = Callable[[list[dict]], float]  # forward and backward of these rows; returns the loss
ECONOMIES = {
    "kept graphs": nullcontext,  # an argument of the step
    "fused layers": lambda: mock.patch.object(decoder, "FUSABLE", set()),
    "packing": lambda: mock.patch.object(decoder, "PACKABLE", set()),
    "compiling": lambda: mock.patch.object(fused_ops, "COMPILE_FROM", 2**62),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=2048, help="batch of the main figure")
    parser.add_argument(
        "--peer_triplets", type=int, default=256, help="of sentence-transformers' side, and ours to it"
    )
    parser.add_argument("--economy_triplets", type=int, default=256, help="of the steps that leave an economy out")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look; the rest is Mistral-7B-v0.1")
    parser.add_argument("--mini_batch_num_tokens", type=int, default=8192, help="ours")
    parser.add_argument("--peer_mini_batch_sizes", type=int, nargs="*", default=[16, 8, 32])
    parser.add_argument("--without", nargs="*", choices=list(ECONOMIES), default=list(ECONOMIES))
    parser.add_argument("--output", help="write the result as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_step.py needs a CUDA device")
    accelerator = Accelerator(mixed_precision="bf16")
    config = MistralConfig(num_hidden_layers=args.layers, dtype=torch.bfloat16)
    model = accelerator.prepare(make_model(config, accelerator.device))
    num_parameters = sum(parameter.numel() for parameter in model.backbone.get_base_model().layers.parameters())
    rows = make_rows(max(args.triplets, args.peer_triplets, args.economy_triplets), config.vocab_size)
    rate = matrix_product_rate()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bf16 matrix products", flush=True)
    runs: dict[str, dict] = {}

    def record(name: str, triplets: int, make_step: Callable[[], Step]) -> dict:
        tokens = count_tokens(rows[:triplets])
        run = {"triplets": triplets, "tokens": tokens, **measure(model, make_step, rows[:triplets])}
        if "seconds" in run:
            seconds = run["seconds"]
            run["triplets_per_second"] = triplets / seconds
            run["tokens_per_second"] = tokens / seconds
            run["share_of_rate"] = 4 * num_parameters * tokens / seconds / rate
        if "seconds" in run and triplets == 2048:
            run["paper_run_hours"] = PAPER_STEPS * run["seconds"] / 3600
        runs[name] = run
        print_run(name, run)
        save_result(args.output, {"layers": args.layers, "rate": rate, "runs": runs})
        return run

    ours = partial(our_step, model, accelerator, args.mini_batch_num_tokens, "auto")
    record("hf-e5, whole batch", args.triplets, ours)
    base = record("hf-e5", args.peer_triplets, ours)
    for size in args.peer_mini_batch_sizes:
        for checkpointing in (False, True):  # the second only where the first fails
            name = f"sentence-transformers, mini_batch_size={size}{', checkpointing' if checkpointing else ''}"
            peer = record(name, args.peer_triplets, partial(peer_step, model, accelerator, size, checkpointing))
            if "seconds" in peer:
                if "seconds" in base:
                    print(f"    hf-e5 makes {peer['seconds'] / base['seconds']:.2f}x as many triplets per second")
                break
    if args.economy_triplets != args.peer_triplets:
        record("hf-e5, the size of what follows", args.economy_triplets, ours)
    for economy in args.without:
        with ECONOMIES[economy]():
            keep: int | Literal["auto"] = 0 if economy == "kept graphs" else "auto"
            make_step = partial(our_step, model, accelerator, args.mini_batch_num_tokens, keep)
            record(f"hf-e5 without {economy}", args.economy_triplets, make_step)


def make_model(config: MistralConfig, device: torch.device) -> E5Model:
    """Random weights with a LoRA adapter; what is measured starts from token ids, so there is no tokenizer."""
    torch.manual_seed(0)
    with device:
        backbone = MistralModel(config).bfloat16()
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    tokenizer: Any = None
    return E5Model(get_peft_model(backbone, lora), tokenizer).train()


def our_step(model: E5Model, accelerator: Accelerator, budget: int, keep: int | Literal["auto"]) -> Step:
    objective = ContrastiveObjective(temperature=0.02, gather_across_devices=False, mask_duplicates=False)
    step = ContrastiveStep(model, objective, accelerator, mini_batch_num_tokens=budget, keep_graph_num_tokens=keep)

    def run(rows: list[dict]) -> float:
        batch = {key: value.to(accelerator.device) for key, value in E5DataCollator()(rows).items()}
        return step(batch).loss.item()

    return run


def peer_step(model: E5Model, accelerator: Accelerator, mini_batch_size: int, checkpointing: bool) -> Step:
    """sentence-transformers' loss on padded token ids, over its own pooling and normalisation."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    pooling = Pooling(model.config.hidden_size, pooling_mode="lasttoken")
    student = accelerator.prepare(nn.Sequential(TokenEmbeddings(model.backbone), pooling, Normalize()))
    loss = CachedMultipleNegativesRankingLoss(student, scale=50.0, mini_batch_size=mini_batch_size)

    def run(rows: list[dict]) -> float:
        columns = ([row[key] for row in rows] for key in ("query_ids", "positive_ids"))
        features = [pad(texts, accelerator.device) for texts in (*columns, [row["negative_ids"][0] for row in rows])]
        if checkpointing:
            model.backbone.enable_input_require_grads()
            model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            value = loss(features, None)
            value.backward()
        finally:
            if checkpointing:
                model.backbone.gradient_checkpointing_disable()
                model.backbone.disable_input_require_grads()
        return value.item()

    return run


class TokenEmbeddings(nn.Module):
    """The backbone as a module of sentence-transformers."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
        return {**features, "token_embeddings": self.backbone(**inputs, use_cache=False).last_hidden_state}


def measure(model: nn.Module, make_step: Callable[[], Step], rows: list[dict]) -> dict:
    """Seconds, peak memory (GB) and loss of one step, after a small one that compiles and measures graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step = make_step()
        step(rows[:WARM_UP_TRIPLETS])
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step(rows)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9, "loss": loss}
    except Exception as error:  # the next configuration may well run
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    finally:
        model.zero_grad()


def print_run(name: str, run: dict) -> None:
    if "failed" in run:
        print(f"{name}: failed ({run['failed']})", flush=True)
        return
    hours = f", {run['paper_run_hours']:.1f} h for {PAPER_STEPS} steps" if "paper_run_hours" in run else ""
    print(
        f"{name}: {run['triplets']} triplets, {run['tokens']} tokens in {run['seconds']:.1f} s: "
        f"{run['triplets_per_second']:.1f} triplets/s, {run['tokens_per_second']:.0f} tokens/s, "
        f"{run['share_of_rate']:.0%} of the rate, peak {run['peak_memory_gb']:.1f} GB{hours}",
        flush=True,
    )


def pad(texts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def count_tokens(rows: list[dict]) -> int:
    return sum(len(text) for row in rows for text in (row["query_ids"], row["positive_ids"], *row["negative_ids"]))


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
