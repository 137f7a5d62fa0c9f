"""Shared fixtures: a two-layer Mistral with a real byte-level tokenizer. No test needs a network."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads sleep while they wait. Where another process wants a core, threads that spin keep one another off it, and
# training for seconds takes minutes. On idle cores sleeping costs a quarter of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

from support import SAMPLE, read_jsonl


@pytest.fixture(scope="session")
def sample_rows() -> list[dict]:
    """The first 400 records of the shipped sample set: real text of all six task types."""
    return read_jsonl(SAMPLE)[:400]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like Mistral's, puts `<s>` in front of a text and nothing behind it."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, sample_rows) -> Path:
    """A folder with a two-layer Mistral (dim 64, grouped-query attention) and its tokenizer, as on the Hub."""
    path = tmp_path_factory.mktemp("tiny-mistral")
    tokenizer = make_tokenizer([row["query"] for row in sample_rows])
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # random weights at this scale tell texts apart; the usual 0.02 hardly does
    )
    MistralModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
