"""From records to a dataset folder, and every way of reading it.

python examples/build_dataset.py outputs/triplets
"""

import json
import sys

import pandas
from datasets import load_dataset

from hf_e5 import SyntheticTriplets, build_dataset


def main(out: str) -> None:
    records = "examples/data/triplets.jsonl"

    # 1. A folder for the Hub: parquet files and a card (the same as `hf-e5 build RECORDS OUT`)
    build_dataset([records], out, license="apache-2.0")

    # 2. Load it: all task types, one of them, or as a stream
    print(load_dataset(out))
    sts = load_dataset(out, "sts", split="train")
    print(sts[0]["query"], "|", sts[0]["positive"], "|", sts[0]["negative"])
    stream = load_dataset(out, split="train", streaming=True)
    print(next(iter(stream))["instruction"])

    # 3. Any reader of parquet will do; what was drawn for a prompt is a JSON object
    frame = pandas.read_parquet(f"{out}/data/short_long/train-00000-of-00001.parquet")
    print(frame["placeholders"].map(json.loads).str["clarity"].value_counts())

    # 4. Without a folder: the builder writes to the cache of `datasets`
    builder = SyntheticTriplets(config_name="bitext", data_files=records)
    builder.download_and_prepare()
    print(builder.as_dataset(split="test"))

    print(f"next: hf-e5 push {out} USER/NAME")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "outputs/triplets")
