"""From raw records to clean ones, and a page to look at both.

    python examples/filter_and_report.py outputs/run

The same as `hf-e5 filter outputs/run` and `hf-e5 report outputs/run`, with a few records spoiled on purpose, so that
there is something to find.
"""

import json
import sys
from pathlib import Path

from hf_e5 import filter_records
from hf_e5.filters.contamination import TestSets, check_contamination
from hf_e5.filters.record_filters import FilterSettings
from hf_e5.report.write import write_report


def main(directory: str) -> None:
    run = Path(directory)
    run.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in open("examples/data/triplets.jsonl", encoding="utf-8")]

    # 1. Spoil some: a repeated record, a refusal, an English answer to a Polish request
    polish = next(row for row in rows if row["document_language"] == "pl" and len(row["positive"]) > 200)
    english = next(row for row in rows if row["document_language"] == "en" and len(row["positive"]) > 200)
    spoiled = [
        {**rows[0], "id": "repeated", "query": rows[0]["query"].upper()},
        {**english, "id": "refused", "negative": "As an AI language model, I cannot write such a passage."},
        {**polish, "id": "not-polish", "positive": english["positive"]},
    ]
    with open(run / "records.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows + spoiled)

    # 2. A test set that leaked into the records: how much of it is there? The paper's appendix B asks this.
    test_sets = TestSets([("my test set", rows[7]["positive"]), ("my test set", "not in the training data at all")])
    texts = ((f"{row['id']}: {name}", row[name]) for row in rows for name in ("query", "positive"))
    print(check_contamination(texts, test_sets).to_markdown())

    # 3. Filter, with the test set kept out, and report
    summary = filter_records(run, settings=FilterSettings(test_sets=test_sets))
    print({name: count for name, count in summary.dropped.items() if count})
    for line in open(run / "dropped.jsonl", encoding="utf-8"):
        row = json.loads(line)
        print(f"{row['id']}: {row['dropped_by']}: {row['reason']}")
    write_report(run)
    print(f"open {run / 'report' / 'index.html'} in a browser; next: hf-e5 build {run / 'kept.jsonl'} OUT")


if __name__ == "__main__":
    main(sys.argv[1])
