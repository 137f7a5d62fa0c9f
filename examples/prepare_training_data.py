"""From records to the batches of a training run: mine missing negatives, mix, validate, plan.

    python examples/prepare_training_data.py outputs/data --miner intfloat/multilingual-e5-base

Any SentenceTransformer (Hub id or folder) can be the miner. The sample set has no negatives for short_short and
long_long; here they get one each, and the rest of the set keeps its own.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import SentenceTransformer

from hf_e5 import load_mixture, mine_hard_negatives
from hf_e5.data.mining.selection import Selection
from hf_e5.data.sampler import TaskBatchSampler, group_rows, hash_texts
from hf_e5.data.validation import validate_mixture


SAMPLE = str(Path(__file__).parent / "data" / "triplets.jsonl")


def main(out: Path, miner: str, max_rows: int | None) -> None:
    out.mkdir(parents=True, exist_ok=True)

    # 1. Every row without a hard negative gets one that scores at most 95 % of its positive.
    rows = load_dataset("json", data_files=SAMPLE, split=f"train[:{max_rows or ''}]")
    mined = mine_hard_negatives(rows, SentenceTransformer(miner), selection=Selection(relative_margin=0.05))
    mined.to_parquet(out / "mined.parquet")

    # 2. A mixture: the mined set and a quarter of the original, with another instruction.
    mixture = {
        "seed": 42,
        "datasets": [
            {"name": "synthetic", "path": str(out / "mined.parquet"), "num_negatives": 1},
            {"name": "again", "path": SAMPLE, "ratio": 0.25, "instruction": "Find a text that fits"},
        ],
    }

    # 3. Look at it before training does. The same texts stand in both datasets, which is reported.
    for report in validate_mixture(mixture):
        print(report)

    # 4. What the trainer reads, and the batches that it will see on two GPUs.
    train_dataset = load_mixture(mixture)
    groups, names = group_rows(train_dataset)
    sampler = TaskBatchSampler(groups, batch_size=64, texts=hash_texts(train_dataset), world_size=2)
    print(f"{len(train_dataset)} rows, {len(sampler)} steps of 2 x 64 rows, one task each; the first five:")
    for batch in sampler.plan(epoch=0)[:5]:
        print(
            f"  {names[groups[batch[0]]]}: {len(batch)} rows, such as {train_dataset[int(batch[0])]['query'][:60]!r}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--miner", default="intfloat/multilingual-e5-base")
    parser.add_argument("--max_rows", type=int, help="fewer rows, to try it out")
    arguments = parser.parse_args()
    main(arguments.out, arguments.miner, arguments.max_rows)
