"""One training step, forward to gradients, against other libraries' steps.

    python examples/benchmarks/train_step.py --triplets 64 --data FOLDER_WITH_PARQUET
    python examples/benchmarks/train_step.py --peer gradcache flagembedding

Same backbone, adapter, rows, batch and precision on all sides; each peer runs through its own classes
(`step_peers.py`) with the best of its settings on the same rows. Each run has a process of its own. Two clocks are
printed: the wall's, and the processor time of all threads, which does not change when others use the machine.

Peers: sentence-transformers; GradCache (pip install git+https://github.com/luyug/GradCache);
FlagEmbedding (pip install FlagEmbedding).
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
from step_peers import PEER_SETTINGS, SIDES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=int, default=256, help="rows of the batch")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="JSONL file, or folder of parquet files")
    parser.add_argument("--model", default=None, help="folder, Hub id or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--peer", nargs="+", choices=list(PEER_SETTINGS), default=["sentence-transformers"])
    parser.add_argument(
        "--peer_settings", nargs="+", metavar="NAME=VALUE[,NAME=VALUE]", help="to try instead, for a single --peer"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of all sides")
    parser.add_argument("--mini_batch_num_tokens", type=int, default=4096, help="ours")
    parser.add_argument("--keep_graph_num_tokens", default="auto", help="ours")
    parser.add_argument("--reference", action="store_true", help="compare all gradients with the fp32 one")
    parser.add_argument("--output", help="write the result as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="", help=argparse.SUPPRESS)
    parser.add_argument("--grads", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_settings and len(args.peer) > 1:
        parser.error("--peer_settings needs a single --peer")
    args.model = args.model or default_model()
    if args.side:
        print(json.dumps(run_side(args)))
        return

    ours_settings = f"mini_batch_num_tokens={args.mini_batch_num_tokens}"
    ours_settings += f",keep_graph_num_tokens={args.keep_graph_num_tokens}"
    with tempfile.TemporaryDirectory() as folder:
        ours_grads, reference_grads = f"{folder}/ours", f"{folder}/reference"
        reference = None
        if args.reference:
            reference = start(args, "reference", ours_settings, reference_grads)
            print_side("hf-e5 in float32, the same weights", reference)
        ours = start(args, "hf-e5", ours_settings, ours_grads)
        if "failed" not in ours and args.reference:
            ours["cosine_to_reference"] = gradient_cosine(reference_grads, ours_grads)
        print_side("hf-e5", ours)
        if "failed" in ours:
            return
        peers: dict[str, dict] = {}
        for name in args.peer:
            runs = {}
            for settings in args.peer_settings or PEER_SETTINGS[name]:
                run = start(args, name, settings, f"{folder}/peer")
                if "failed" not in run:
                    run["gradient_cosine"] = gradient_cosine(ours_grads, f"{folder}/peer")
                    if args.reference:
                        run["cosine_to_reference"] = gradient_cosine(reference_grads, f"{folder}/peer")
                    assert run["tokens"] == ours["tokens"], f"{name} has {run['tokens']} tokens of text"
                print_side(f"{name}, {settings}", run)
                runs[settings] = run
            peers[name] = {"runs": runs, **compare(name, runs, ours)}
    result = {"triplets": args.triplets, "dtype": args.dtype, "hf-e5": ours, "reference": reference, "peers": peers}
    save_result(args.output, result)


def start(args: argparse.Namespace, side: str, settings: str, grads: str) -> dict:
    """Run one side in a process of its own; its gradients are written to file `grads`."""
    options = ["--triplets", str(args.triplets), "--data", str(args.data), "--model", args.model]
    options += ["--dtype", args.dtype, "--side", side, "--settings", settings, "--grads", grads]
    return run_child(__file__, *options)


def run_side(args: argparse.Namespace) -> dict:
    """In the child process: warm up on 8 rows, then measure one step on all of them."""
    rows = read_rows(args.data, args.triplets)
    settings = dict(setting.split("=") for setting in args.settings.split(","))
    numbers = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
    model = load_model(args.model, getattr(torch, args.dtype))
    is_bf16 = args.dtype == "bfloat16"
    side = args.side
    if side == "reference":
        model, side, is_bf16 = model.float(), "hf-e5", False
    prepare = SIDES[side](model, is_bf16, **numbers)
    prepare(rows[:8]).run()
    model.zero_grad()
    step = prepare(rows)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_memory()
    save_file({name: value.grad for name, value in model.named_parameters() if value.grad is not None}, args.grads)
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "triplets_per_second": args.triplets / wall,
        "tokens": step.num_tokens,
        "peak_memory_gb": peak,
        "loss": loss,
        **step.details(),
    }


def compare(name: str, runs: dict[str, dict], ours: dict) -> dict:
    """Print the ratios against the fastest of the runs that finished; return them."""
    finished = {settings: run for settings, run in runs.items() if "failed" not in run}
    if not finished:
        print(f"{name} ran with none of these settings\n", flush=True)
        return {"best": None}
    best = min(finished, key=lambda settings: finished[settings]["wall_seconds"])
    ratio = {key: finished[best][key] / ours[key] for key in ("wall_seconds", "cpu_seconds", "peak_memory_gb")}
    print(
        f"against {name} at its best ({best}): {ratio['wall_seconds']:.2f}x triplets per second by the wall's clock, "
        f"{ratio['cpu_seconds']:.2f}x by\nprocessor time; its peak memory is {ratio['peak_memory_gb']:.2f}x ours\n",
        flush=True,
    )
    return {"best": best, "ratio": ratio}


def gradient_cosine(path: str, other_path: str) -> float:
    """Cosine of all gradients as one vector, in float64."""
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
        f"peak memory {side['peak_memory_gb']:.1f} GB"
    )
    line = f"    loss {side['loss']:.5f}"
    if "gradient_cosine" in side:
        line += f", gradient cosine to ours {side['gradient_cosine']:.5f}"
    if "cosine_to_reference" in side:
        line += f", to the float32 gradient {side['cosine_to_reference']:.5f}"
    print(line, flush=True)
    if "tokens_computed" in side:
        print(
            f"    {side['tokens']} tokens of text, {side['tokens_computed']} computed, "
            f"{side['tokens_recomputed']} of them twice; attention pads {side['padding_in_attention']:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
