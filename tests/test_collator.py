import pytest
import torch
from accelerate.utils import find_batch_size
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_e5.data.collator import E5DataCollator
from hf_e5.data.tokenization import tokenize_dataset
from hf_e5.errors import InputError


ROWS = {
    "instruction": ["find it", "find it", None],
    "query": ["red", "blue sky", "red"],
    "positive": ["a red door", "the sky", "red"],
    "negative": ["the sky", None, ["a dog", "", "a red door"]],
}


@pytest.fixture(scope="module")
def tokenizer():
    """Characters as tokens, with BOS and EOS from the post-processor."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *map(chr, range(10, 128))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenize_dataset(Dataset.from_dict({**ROWS, "negative": [["the sky"], [], ROWS["negative"][2]]}), tokenizer)


def texts_of(batch):
    return [tuple(ids.tolist()) for ids in batch["input_ids"].split(batch["lengths"].tolist())]


def test_tokens_prefix_and_truncation(tokenizer, rows):
    assert rows.column_names == ["query_ids", "query_prefix_length", "positive_ids", "negative_ids"]
    prompt = "Instruct: find it\nQuery: "
    assert rows[0]["query_ids"] == tokenizer(prompt + "red")["input_ids"]
    assert rows[0]["query_prefix_length"] == 1 + len(prompt)  # BOS belongs to the prefix
    assert rows[2]["query_ids"] == tokenizer("red")["input_ids"] and rows[2]["query_prefix_length"] == 0
    assert [len(ids) for ids in rows["negative_ids"]] == [1, 0, 2]
    row = Dataset.from_dict({"query": ["abcdef"], "positive": ["ghijkl"]})
    short = tokenize_dataset(row, tokenizer, query_max_length=5, passage_max_length=4)
    assert len(short[0]["query_ids"]) == 5 and len(short[0]["positive_ids"]) == 4
    assert short[0]["query_ids"][-1] == short[0]["positive_ids"][-1] == tokenizer.eos_token_id
    assert short[0]["negative_ids"] == []


def test_prefix_leaves_a_token_to_the_query(tokenizer):
    row = Dataset.from_dict({"instruction": ["a long instruction"], "query": ["x"], "positive": ["y"]})
    tokens = tokenize_dataset(row, tokenizer, query_max_length=6)[0]
    assert tokens["query_prefix_length"] == 5 < len(tokens["query_ids"])


def test_each_distinct_text_appears_once(rows):
    batch = E5DataCollator()(rows)
    texts = texts_of(batch)
    assert len(set(texts)) == len(texts) == 6  # three queries, two documents, "red" as query and positive, "a dog"
    for position, row in enumerate(rows):
        assert list(texts[batch["queries"][position]]) == row["query_ids"]
        assert list(texts[batch["positives"][position]]) == row["positive_ids"]
        negatives = batch["negatives"][batch["negative_rows"] == position]
        assert [list(texts[index]) for index in negatives] == row["negative_ids"]
    assert batch["prefix_lengths"][batch["queries"]].tolist() == rows["query_prefix_length"]
    assert len(set(batch["text_hashes"].tolist())) == len(texts)


def test_hashes_do_not_depend_on_the_batch(rows):
    whole, part = E5DataCollator()(rows), E5DataCollator()(rows.select([1]))
    expected = dict(zip(texts_of(whole), whole["text_hashes"].tolist(), strict=True))
    assert all(
        expected[text] == hash_ for text, hash_ in zip(texts_of(part), part["text_hashes"].tolist(), strict=True)
    )


def test_batch_is_what_the_trainer_and_workers_expect(rows):
    loader = DataLoader(rows, batch_size=2, collate_fn=E5DataCollator(), num_workers=1)
    batches = list(loader)
    assert [find_batch_size(batch) for batch in batches] == [2, 1]
    for batch in batches:
        assert "labels" not in batch
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_without_negatives(rows):
    batch = E5DataCollator()([{"query_ids": [1, 2], "positive_ids": [3]}])
    assert batch["negatives"].shape == batch["negative_rows"].shape == (0,)
    assert batch["lengths"].tolist() == [2, 1]


@pytest.mark.parametrize(
    "columns, message",
    [({"query": ["a"]}, "no column 'positive'"), ({"query": ["a", " "], "positive": ["b", "c"]}, "row 1: 'query'")],
)
def test_wrong_rows_are_named(tokenizer, columns, message):
    with pytest.raises(InputError, match=message):
        tokenize_dataset(Dataset.from_dict(columns), tokenizer)
