"""Where records come from: what their synthesis runs left beside them, summed for the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import ANSWERS_FILE, FILTERS_FILE, KEPT_FILE, RUN_FILE, Usage, read_json


@dataclass
class Provenance:
    """What is known of the runs; empty where the records came alone.

    Attributes:
        runs: what identifies each run: its seed and the hash of its configuration (recipe and prompts).
        usage: answers, tokens and cost by model.
        dropped: records dropped, by filter; empty if no filters ran.
        num_filtered: records that the filters saw.
        test_sets: names of the sets that the contamination filter compared with.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    dropped: Counter[str] = field(default_factory=Counter)
    num_filtered: int = 0
    test_sets: set[str] = field(default_factory=set)


def read_provenance(files: Sequence[Path]) -> Provenance:
    """Read `run.json`, `answers.jsonl` and, for records that were filtered, `filters.json` beside each record file."""
    provenance = Provenance()
    for folder in dict.fromkeys(file.parent for file in files):
        if (folder / RUN_FILE).exists():
            run = read_json(folder / RUN_FILE)
            facts = {key: value for key, value in run.items() if isinstance(value, (str, int))}
            if facts not in provenance.runs:  # the shards of one run have the same
                provenance.runs.append(facts)
        if (folder / ANSWERS_FILE).exists():
            provenance.usage.add_file(folder / ANSWERS_FILE)
    for file in files:
        summary_file = file.parent / FILTERS_FILE
        if file.name == KEPT_FILE and summary_file.exists():
            summary = read_json(summary_file)
            provenance.dropped.update(summary["dropped"])
            provenance.num_filtered += summary["records"]
            provenance.test_sets.update(summary.get("settings", {}).get("test_sets", []))
    return provenance
