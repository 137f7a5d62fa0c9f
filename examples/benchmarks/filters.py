"""Throughput and memory of `hf-e5 filter` on generated records.

    python examples/benchmarks/filters.py 200000 outputs/filters

The records are the sample set with its sentences shuffled within each language: real text of real length.
"""

import json
import random
import re
import resource
import sys
import time
from pathlib import Path

from hf_e5.filters.run import filter_records


def write_records(path: Path, count: int) -> None:
    rng = random.Random(0)
    rows = [json.loads(line) for line in open("examples/data/triplets.jsonl", encoding="utf-8")]
    sentences: dict[str, list[str]] = {}
    for row in rows:
        for text in (row["query"], row["positive"] if row["task_type"] != "long_short" else ""):
            language = row["language" if text == row["query"] else "document_language"]
            sentences.setdefault(language, []).extend(re.findall(r"[^.!?。؟।]{9,}[.!?。؟।]?", text))

    def shuffled(text: str, language: str) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < len(text):
            parts.append(rng.choice(sentences[language]).strip())
        return " ".join(parts)

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = dict(rng.choice(rows), id=f"{number:07d}")
            row["query"] = shuffled(row["query"], row["language"])
            if row["task_type"] != "long_short":
                row["positive"] = shuffled(row["positive"], row["document_language"])
                if row.get("negative"):
                    row["negative"] = shuffled(row["negative"], row["document_language"])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(count: int, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_records(directory / "records.jsonl", count)
    start = time.perf_counter()
    summary = filter_records(directory)
    seconds = time.perf_counter() - start
    parent = resource.getrusage(resource.RUSAGE_SELF)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = parent.ru_utime + workers.ru_utime
    print({name: dropped for name, dropped in summary.dropped.items() if dropped}, f"kept {summary.kept:,}")
    print(
        f"{count:,} records in {seconds:.0f} s: {count / seconds:,.0f} records/s, {cpu / count * 1e3:.2f} ms CPU each"
    )
    print(f"peak memory: {parent.ru_maxrss / 1024:.0f} MB; in the largest worker {workers.ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
