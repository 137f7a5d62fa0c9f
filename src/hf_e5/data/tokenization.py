"""Tokenise a triplet dataset once, before training, instead of once per epoch in the collator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value

from ..errors import InputError
from ..instructions import query_prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


COLUMNS = ("query_ids", "query_prefix_length", "positive_ids", "negative_ids")


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    query_max_length: int = 512,
    passage_max_length: int = 512,
    num_proc: int | None = None,
) -> Dataset:
    """Return the rows as token ids: what [`~hf_e5.E5DataCollator`] reads. Cached on disk by `datasets`.

    Args:
        dataset: columns `query` and `positive` (text), optionally `instruction` (text or None: prefix of the query)
            and `negative` (text, a list of texts, or None).
        tokenizer: must append EOS by itself (`E5Model.tokenizer` does), so that EOS survives truncation.
        query_max_length: tokens of instruction, query and EOS together.
        passage_max_length: tokens of a document with EOS.

    Returns:
        A dataset with the columns `query_ids` (list of int), `query_prefix_length` (how many of them are the
        instruction), `positive_ids` (list of int) and `negative_ids` (list of such lists, possibly empty).

    Raises:
        InputError: if a column is missing or a text is empty.
    """
    missing = [name for name in ("query", "positive") if name not in dataset.column_names]
    if missing:
        raise InputError(f"the dataset has no column {missing[0]!r} (it has {', '.join(dataset.column_names)})")

    def tokenize(texts: list[str], max_length: int) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []

    def tokenize_rows(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        for name in ("query", "positive"):
            for index, text in zip(indices, rows[name], strict=True):
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"row {index}: {name!r} is empty; remove the row or fill it")
        prompts = [query_prompt(instruction) for instruction in rows.get("instruction", [None] * len(indices))]
        query_ids = tokenize(
            [prompt + query for prompt, query in zip(prompts, rows["query"], strict=True)], query_max_length
        )
        distinct_prompts = sorted(set(prompts) - {""})
        prompt_ids = dict(zip(distinct_prompts, tokenize(distinct_prompts, query_max_length), strict=True))
        negatives = [as_texts(negative) for negative in rows.get("negative", [None] * len(indices))]
        negative_ids = iter(tokenize([text for texts in negatives for text in texts], passage_max_length))
        return {
            "query_ids": query_ids,
            "query_prefix_length": [
                _common_prefix(prompt_ids.get(prompt, []), ids) for prompt, ids in zip(prompts, query_ids, strict=True)
            ],
            "positive_ids": tokenize(rows["positive"], passage_max_length),
            "negative_ids": [[next(negative_ids) for _ in texts] for texts in negatives],
        }

    ids = List(Value("int32"))
    types = (ids, Value("int32"), ids, List(ids))
    return dataset.map(
        tokenize_rows,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(dict(zip(COLUMNS, types, strict=True))),
        num_proc=num_proc,
        desc="tokenising",
    )


def as_texts(negative: str | list[str] | None) -> list[str]:
    """The texts of a `negative` column's value: one, several or none; empty ones do not count."""
    texts = [negative] if isinstance(negative, str) else negative or []
    return [text for text in texts if text and text.strip()]


def _common_prefix(prompt: list[int], ids: list[int]) -> int:
    """How many tokens the prompt alone and prompt + query share: fewer than the prompt has where tokens merge.

    At least one token is left to the query itself, so that what follows a shared prefix is never empty.
    """
    shared = 0
    for one, other in zip(prompt, ids[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return shared
