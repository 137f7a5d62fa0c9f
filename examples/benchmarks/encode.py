"""Embedding texts: `E5Model.encode` against `SentenceTransformer.encode` on the folder that `hf-e5 export` writes.

    python examples/benchmarks/encode.py --texts 200

Queries that share one instruction, and documents. Both sides read the same exported folder (SmolLM2-135M with a random
LoRA adapter merged) in a process of their own; the peer runs with the best of its batch sizes. Two clocks are printed:
the wall's, and the processor time of all threads, which does not change when others use the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from step_common import SAMPLE, default_model, load_model, peak_memory, run_child, save_result

from hf_e5.modeling.encoder import E5Model


INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
KINDS = ("queries", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500, help="queries, and as many documents")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="JSONL or parquet file with `query` and `positive`")
    parser.add_argument("--model", default=None, help="folder, Hub id or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--peer_batch_sizes", type=int, nargs="+", default=(8, 32), help="the best one counts")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of both sides")
    parser.add_argument("--output", help="write the result as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return

    with tempfile.TemporaryDirectory() as work:
        export(args.model or default_model(), getattr(torch, args.dtype), Path(work))
        common = ["--texts", str(args.texts), "--data", str(args.data), "--dtype", args.dtype]
        common += ["--folder", f"{work}/model"]
        ours = run_child(__file__, *common, "--side", "hf-e5", "--vectors", f"{work}/ours")
        print_side("hf-e5", ours)
        peers = {}
        for size in args.peer_batch_sizes:
            peer = run_child(__file__, *common, "--side", str(size), "--vectors", f"{work}/{size}")
            print_side(f"sentence-transformers, batch_size={size}", peer)
            if "failed" not in peer:
                peers[size] = peer
        result = {"texts": args.texts, "dtype": args.dtype, "hf-e5": ours, "sentence-transformers": peers}
        for kind in KINDS:
            best = min(peers, key=lambda size: peers[size][kind]["cpu_seconds"])
            ratio = {key: peers[best][kind][key] / ours[kind][key] for key in ("wall_seconds", "cpu_seconds")}
            difference = load_file(f"{work}/ours")[kind] - load_file(f"{work}/{best}")[kind]
            result[kind] = {"best": best, "ratio": ratio, "max_difference": difference.abs().max().item()}
            print(
                f"{kind}, against its best batch size ({best}): {ratio['wall_seconds']:.2f}x texts per second by the "
                f"wall's clock, {ratio['cpu_seconds']:.2f}x by processor time; "
                f"vectors differ by at most {result[kind]['max_difference']:.1e}"
            )
    save_result(args.output, result)


def export(name: str, dtype: torch.dtype, work: Path) -> None:
    from hf_e5.export.sentence_transformer import export_sentence_transformer

    load_model(name, dtype).save_pretrained(work / "checkpoint")
    report = export_sentence_transformer(
        work / "checkpoint", work / "model", merge=True, instruction=INSTRUCTION, dtype=dtype
    )
    print(f"exported: {report}", flush=True)


def read_texts(source: Path, count: int) -> dict[str, list[str]]:
    """Draw rows of one task: those of type `short_long`, or any if the rows have no type."""
    if source.suffix == ".parquet":
        from datasets import load_dataset

        rows = list(load_dataset("parquet", data_files=str(source), split="train"))
    else:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("task_type", "short_long") == "short_long"]
    rows = random.Random(0).sample(rows, count)
    return {"queries": [row["query"] for row in rows], "documents": [row["positive"] for row in rows]}


def run_side(args: argparse.Namespace) -> dict:
    encode, counter = (load_ours if args.side == "hf-e5" else load_peer)(args)
    vectors, result = {}, {}
    for kind, texts in read_texts(args.data, args.texts).items():
        encode[kind](texts[:16])  # compiles, where that is done
        counter.tokens = 0
        wall, cpu = time.perf_counter(), time.process_time()
        vectors[kind] = encode[kind](texts).float().cpu().contiguous()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rate = {"texts_per_second": len(texts) / wall, "tokens_computed": counter.tokens}
        result[kind] = {"wall_seconds": wall, "cpu_seconds": cpu, **rate}
    save_file(vectors, args.vectors)
    return {**result, "peak_memory_gb": peak_memory()}


class Counter:
    """Counts the tokens that go into the model, padding included."""

    tokens = 0


def load_ours(args: argparse.Namespace) -> tuple[dict[str, Callable], Counter]:
    model, counter = E5Model.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)), Counter()

    def count(_: object, args: tuple, inputs: dict) -> None:
        counter.tokens += inputs["pack"].num_tokens if "pack" in inputs else inputs["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return {"queries": lambda texts: model.encode(texts, instruction=INSTRUCTION), "documents": model.encode}, counter


def load_peer(args: argparse.Namespace) -> tuple[dict[str, Callable], Counter]:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": getattr(torch, args.dtype)}
    model, counter = SentenceTransformer(args.folder, device="cpu", model_kwargs=options), Counter()

    def count(_: object, inputs: tuple) -> None:
        counter.tokens += inputs[0]["input_ids"].numel()

    model[0].register_forward_pre_hook(count)
    options = {"batch_size": int(args.side), "convert_to_tensor": True}
    return {
        "queries": lambda texts: model.encode_query(texts, **options),
        "documents": lambda texts: model.encode_document(texts, **options),
    }, counter


def print_side(name: str, side: dict) -> None:
    if "failed" in side:
        print(f"{name}: failed ({side['failed']})", flush=True)
        return
    print(f"{name}: peak memory {side['peak_memory_gb']:.1f} GB", flush=True)
    for kind in KINDS:
        part = side[kind]
        print(
            f"    {kind}: {part['wall_seconds']:.1f} s ({part['cpu_seconds']:.1f} s of processor time), "
            f"{part['texts_per_second']:.1f} texts/s, {part['tokens_computed']} tokens computed",
            flush=True,
        )


if __name__ == "__main__":
    main()
