"""One training step, forward to gradients, against sentence-transformers' cached loss.

    python examples/benchmarks/train_step.py --triplets 64 --data FOLDER_WITH_PARQUET

Same backbone, adapter, rows, batch and precision on both sides; the peer runs through its own trainer's step, with the
best of its settings on the same rows. Each side has a process of its own. Two clocks are printed: the wall's, and the
processor time of all threads, which does not change when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from step_common import SAMPLE, default_model, load_model, peak_memory, read_rows, run_child, save_result

from hf_e5.data.collator import E5DataCollator
from hf_e5.data.tokenization import tokenize_dataset
from hf_e5.instructions import format_query


PEER_SETTINGS = ("mini_batch_size=4", "mini_batch_size=8", "mini_batch_size=16", "mini_batch_num_tokens=2048")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=256, help="rows of the batch")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="JSONL file, or folder of parquet files")
    parser.add_argument("--model", default=None, help="folder, Hub id or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--peer", choices=["sentence-transformers"], default="sentence-transformers")
    parser.add_argument("--peer_settings", nargs="+", default=PEER_SETTINGS, help="of its loss; the best one counts")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of both sides")
    parser.add_argument("--mini_batch_num_tokens", type=int, default=4096, help="ours")
    parser.add_argument("--keep_graph_num_tokens", default="auto", help="ours")
    parser.add_argument("--output", help="write the result as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--grads", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or default_model()
    if args.side:
        rows = read_rows(args.data, args.triplets)
        print(json.dumps(run_ours(args, rows) if args.side == "hf-e5" else run_peer(args, rows)))
        return

    with tempfile.TemporaryDirectory() as folder:
        common = ["--triplets", str(args.triplets), "--data", str(args.data), "--model", args.model]
        common += ["--dtype", args.dtype]
        ours_options = ["--mini_batch_num_tokens", str(args.mini_batch_num_tokens)]
        ours_options += ["--keep_graph_num_tokens", args.keep_graph_num_tokens]
        ours = run_child(__file__, *common, *ours_options, "--side", "hf-e5", "--grads", f"{folder}/ours")
        print_side("hf-e5", ours)
        peers = {}
        for setting in args.peer_settings:
            peer = run_child(__file__, *common, "--side", setting, "--grads", f"{folder}/{setting}")
            print_side(f"sentence-transformers, {setting}", peer)
            if "failed" not in peer:
                peers[setting] = peer
        best = min(peers, key=lambda setting: peers[setting]["cpu_seconds"])
        cosine = gradient_cosine(f"{folder}/ours", f"{folder}/{best}")
    ratio = {key: peers[best][key] / ours[key] for key in ("wall_seconds", "cpu_seconds", "peak_memory_gb")}
    print(
        f"\nagainst its best setting ({best}): {ratio['wall_seconds']:.2f}x triplets per second by the wall's clock,"
    )
    print(f"{ratio['cpu_seconds']:.2f}x by processor time; its peak memory is {ratio['peak_memory_gb']:.2f}x ours")
    print(f"gradient cosine {cosine:.5f}, loss {ours['loss']:.5f} and {peers[best]['loss']:.5f}")
    result = {
        "triplets": args.triplets,
        "dtype": args.dtype,
        "hf-e5": ours,
        "sentence-transformers": peers,
        "best": best,
    }
    save_result(args.output, {**result, "ratio": ratio, "gradient_cosine": cosine})


def run_ours(args: argparse.Namespace, rows: list[dict]) -> dict:
    from accelerate import Accelerator
    from datasets import Dataset

    from hf_e5.modeling.packing import Pack, padding_share
    from hf_e5.training.arguments import E5TrainingArguments
    from hf_e5.training.gradcache import ContrastiveStep

    settings = E5TrainingArguments(
        output_dir=tempfile.gettempdir(),
        mini_batch_num_tokens=args.mini_batch_num_tokens,
        keep_graph_num_tokens=args.keep_graph_num_tokens,
    )
    accelerator = Accelerator(mixed_precision="bf16" if args.dtype == "bfloat16" else "no")
    model = load_model(args.model, getattr(torch, args.dtype))
    batch = E5DataCollator()(list(tokenize_dataset(Dataset.from_list(rows), model.tokenizer)))
    step = ContrastiveStep(accelerator.prepare(model), settings, accelerator)
    warm_up = E5DataCollator()(list(tokenize_dataset(Dataset.from_list(rows[:8]), model.tokenizer)))
    step(warm_up)
    model.zero_grad()
    plan = step.plan(batch)
    packs = [pack for pack in (*plan.kept, *plan.recomputed) if isinstance(pack, Pack)]
    with Clock() as clock:
        output = step(batch)
    save_grads(model, args.grads)
    tokens = int(batch["lengths"].sum())
    return {
        **clock.result(tokens, args.triplets),
        "loss": output.loss.item(),
        "tokens_computed": sum(pack.num_tokens for pack in packs),
        "tokens_recomputed": sum(pack.num_tokens for pack in plan.recomputed),
        "padding_in_attention": padding_share(packs),
    }


def run_peer(args: argparse.Namespace, rows: list[dict]) -> dict:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model = load_model(args.model, getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        model.backbone.get_base_model().config.save_pretrained(folder)  # architecture only: the model replaces it
        torch.save({}, Path(folder) / "pytorch_model.bin")
        model.tokenizer.chat_template = None
        model.tokenizer.model_max_length = 512
        model.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.model = model.backbone
    pooling = Pooling(model.config.hidden_size, pooling_mode="lasttoken")
    student = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    name, value = args.side.split("=")
    loss = CachedMultipleNegativesRankingLoss(student, scale=50.0, **{name: int(value)})
    columns = [
        {
            "anchor": format_query(row["query"], row["instruction"]),
            "positive": row["positive"],
            "negative": row["negative"],
        }
        for row in rows
    ]
    is_bf16 = args.dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(folder, per_device_train_batch_size=args.triplets, bf16=is_bf16, use_cpu=True)
        trainer = SentenceTransformerTrainer(student, arguments, Dataset.from_list(columns), loss=loss)
        prepared = trainer.accelerator.prepare(student)
        batch = next(iter(trainer.get_train_dataloader()))
        small = SentenceTransformerTrainer(
            student,
            Arguments(folder, per_device_train_batch_size=8, bf16=is_bf16, use_cpu=True),
            Dataset.from_list(columns[:8]),
            loss=loss,
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(prepared, next(iter(small.get_train_dataloader())))
        student.zero_grad()
        with Clock() as clock:
            value = trainer.training_step(prepared, batch)
    save_grads(model, args.grads)
    tokens = sum(int(batch[key].sum()) for key in batch if key.endswith("attention_mask"))
    return {**clock.result(tokens, args.triplets), "loss": float(value)}


class Clock:
    """Wall and processor seconds of a block."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def result(self, tokens: int, triplets: int) -> dict:
        return {
            "wall_seconds": self.wall,
            "cpu_seconds": self.cpu,
            "triplets_per_second": triplets / self.wall,
            "tokens": tokens,
            "peak_memory_gb": peak_memory(),
        }


def save_grads(model: torch.nn.Module, path: str) -> None:
    save_file({name: value.grad for name, value in model.named_parameters() if value.grad is not None}, path)


def gradient_cosine(path: str, other_path: str) -> float:
    ours, theirs = load_file(path), load_file(other_path)
    assert ours.keys() == theirs.keys(), "the two sides trained different tensors"
    flat, other = (torch.cat([grads[name].double().flatten() for name in ours]) for grads in (ours, theirs))
    return torch.cosine_similarity(flat, other, dim=0).item()


def print_side(name: str, side: dict) -> None:
    if "failed" in side:
        print(f"{name}: failed ({side['failed']})", flush=True)
        return
    print(
        f"{name}: {side['wall_seconds']:.1f} s ({side['cpu_seconds']:.1f} s of processor time), "
        f"{side['triplets_per_second']:.2f} triplets/s, {side['tokens'] / side['wall_seconds']:.0f} tokens/s, "
        f"peak memory {side['peak_memory_gb']:.1f} GB",
        flush=True,
    )
    if "tokens_computed" in side:
        print(
            f"    {side['tokens']} tokens of text, {side['tokens_computed']} computed, "
            f"{side['tokens_recomputed']} of them twice; attention pads {side['padding_in_attention']:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
