"""What the tests share: the sample records, JSON Lines files, the command line, LoRA settings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hf_e5.cli import main


ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "data" / "triplets.jsonl"


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run_cli(*arguments: object) -> int | None:
    """Run a command of hf-e5 in this process and return its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:  # argparse's: --help, a wrong flag
        return leave.code


def lora_config(**changes: Any) -> LoraConfig:
    """LoRA of rank 4 on all linear layers."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}
    return LoraConfig(**{**defaults, **changes})
