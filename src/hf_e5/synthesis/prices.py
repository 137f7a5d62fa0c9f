"""What answers cost: USD per million input and output tokens, from `data/prices.tsv` or the configuration.

The file holds the list prices its authors last knew; they change, so check them before you spend.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files


BATCH_DISCOUNT = 0.5  # the OpenAI Batch API bills half

Prices = dict[str, tuple[float, float]]


@cache
def listed_prices() -> Prices:
    """Return (input, output) USD per million tokens by model name."""
    text = files("hf_e5.synthesis").joinpath("data/prices.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return {row["model"]: (float(row["input"]), float(row["output"])) for row in rows}


def find_price(model: str, own: Prices | None = None) -> tuple[float, float] | None:
    """Return a model's price, or None if it has none; a dated name ("gpt-4o-2024-08-06") has that of its family."""
    if own and model in own:
        return own[model]
    families = [name for name in listed_prices() if model == name or model.startswith(f"{name}-20")]
    return listed_prices()[max(families, key=len)] if families else None


def cost_of(price: tuple[float, float] | None, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Return USD, or None without a price."""
    return None if price is None else (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6
