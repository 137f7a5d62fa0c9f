"""Time and peak memory of `hf-e5 build` on generated records.

    python examples/benchmarks/build_dataset.py --num_records 50000 500000

The records are the rows of the sample set, over and over, with ids and instructions of their own, so that lengths,
languages and task types are those of real data.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path


SAMPLE = Path(__file__).parents[1] / "data" / "triplets.jsonl"


def write_records(path: Path, num_records: int) -> None:
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), num_records)):
            # As in the paper, about three examples share an instruction.
            edition = number // len(rows) // 3
            instruction = (
                row["instruction"] if row["task_type"] in ("sts", "bitext") else f"{row['instruction']} ({edition})"
            )
            record = {**row, "id": f"{number:08d}", "instruction": instruction, "query": f"{row['query']} {number}"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, nargs="+", default=[50_000, 500_000])
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores; {'records':>10} {'input':>9} {'seconds':>8} {'rows/s':>8} {'peak memory':>12}")
    for num_records in args.num_records:
        with tempfile.TemporaryDirectory() as folder:
            records, out = Path(folder) / "records.jsonl", Path(folder) / "dataset"
            write_records(records, num_records)
            size = records.stat().st_size
            start = time.perf_counter()
            command = [sys.executable, "-m", "hf_e5.cli", "build", str(records), str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
        # The largest of the children so far: give the sizes in rising order. Kilobytes on Linux.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            f"{'':13} {num_records:>10,} {size / 1e6:>6.0f} MB {seconds:>8.1f} {num_records / seconds:>8,.0f}"
            f" {peak / 1e6:>9.0f} MB"
        )


if __name__ == "__main__":
    main()
