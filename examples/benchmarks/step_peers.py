"""One training step of hf-e5 and of each peer, behind one interface, for `train_step.py`.

A side is a function that takes the model (backbone and adapter are the same objects for all), the precision and the
side's settings, and returns `prepare`: from rows it makes the side's own batch (tokenised and padded, outside of any
measurement) and returns a `Step`. Temperature 0.02, last-token pooling and unit vectors everywhere; every query is
contrasted with the positives and negatives of all rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from datasets import Dataset

from hf_e5.data.collator import E5DataCollator
from hf_e5.data.tokenization import tokenize_dataset
from hf_e5.instructions import format_query
from hf_e5.modeling.encoder import E5Model
from hf_e5.modeling.packed.layout import Pack
from hf_e5.training.gradcache import ContrastiveStep
from hf_e5.training.objective import ContrastiveObjective


TEMPERATURE = 0.02
MAX_LENGTH = 512


@dataclass
class Step:
    """Forward and backward of one batch."""

    run: Callable[[], float]  # leaves the gradients in the parameters, returns the loss
    num_tokens: int  # tokens of text in the batch, repetitions counted, padding not
    details: Callable[[], dict] = dict  # what else is worth printing after `run`


Prepare = Callable[[list[dict]], Step]


def hf_e5(model: E5Model, is_bf16: bool, **budgets: int | Literal["auto"]) -> Prepare:
    """Our step. Duplicates are not masked, because no peer masks them."""
    objective = ContrastiveObjective(temperature=TEMPERATURE, gather_across_devices=False, mask_duplicates=False)
    accelerator = _accelerator(is_bf16)
    step = ContrastiveStep(accelerator.prepare(model), objective, accelerator, **budgets)

    def prepare(rows: list[dict]) -> Step:
        batch = E5DataCollator()(list(tokenize_dataset(Dataset.from_list(rows), model.tokenizer)))
        texts = torch.cat([batch["queries"], batch["positives"], batch["negatives"]])

        def details() -> dict:
            plan = step.plan(batch)
            packs = [pack for pack in (*plan.kept, *plan.recomputed) if isinstance(pack, Pack)]
            groups = [group for pack in packs for group in pack.groups]
            rows = sum(group.stop - group.start for group in groups)
            places = sum(group.num_texts * group.length for group in groups)
            return {
                "tokens_computed": sum(pack.num_tokens for pack in packs),
                "tokens_recomputed": sum(pack.num_tokens for pack in plan.recomputed),
                "padding_in_attention": 1 - rows / places,
            }

        return Step(lambda: step(batch).loss.item(), int(batch["lengths"][texts].sum()), details)

    return prepare


def sentence_transformers(model: E5Model, is_bf16: bool, **settings: int) -> Prepare:
    """`CachedMultipleNegativesRankingLoss` through its own trainer's step."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        model.backbone.get_base_model().config.save_pretrained(folder)  # architecture only: the model replaces it
        torch.save({}, Path(folder) / "pytorch_model.bin")
        model.tokenizer.model_max_length = MAX_LENGTH
        model.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.model = model.backbone
    pooling = Pooling(model.config.hidden_size, pooling_mode="lasttoken")
    student = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(student, scale=1 / TEMPERATURE, **settings)

    def prepare(rows: list[dict]) -> Step:
        columns = [{"anchor": _query(row), "positive": row["positive"], "negative": row["negative"]} for row in rows]
        arguments = SentenceTransformerTrainingArguments(
            tempfile.gettempdir(), per_device_train_batch_size=len(rows), bf16=is_bf16, use_cpu=True
        )
        trainer = SentenceTransformerTrainer(student, arguments, Dataset.from_list(columns), loss=loss)
        trainer.current_gradient_accumulation_steps = 1
        prepared = trainer.accelerator.prepare(student)
        batch = next(iter(trainer.get_train_dataloader()))
        masks = [value for key, value in batch.items() if key.endswith("attention_mask")]
        return Step(lambda: trainer.training_step(prepared, batch).item(), sum(int(mask.sum()) for mask in masks))

    return prepare


def gradcache(model: E5Model, is_bf16: bool, chunk_size: int) -> Prepare:
    """luyug/GradCache's `cache_step` as published: each side padded to its longest text, chunks in the rows' order.

    The encoder given to it is `E5Model` on padded input (transformers' own modules), so it normalises in fp32.
    """
    from grad_cache import GradCache
    from grad_cache.loss import SimpleContrastiveLoss

    encoder = _accelerator(is_bf16).prepare(model)
    contrast = SimpleContrastiveLoss()
    cache = GradCache(
        models=[encoder, encoder],
        chunk_sizes=chunk_size,
        loss_fn=lambda queries, documents, target: contrast(queries / TEMPERATURE, documents, target),
    )

    def prepare(rows: list[dict]) -> Step:
        queries, documents = (
            model.tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            for texts in (
                [_query(row) for row in rows],
                [row[key] for key in ("positive", "negative") for row in rows],
            )
        )
        inputs = [{key: side[key] for key in ("input_ids", "attention_mask")} for side in (queries, documents)]
        num_tokens = sum(int(side["attention_mask"].sum()) for side in inputs)
        return Step(lambda: cache.cache_step(*inputs, target=torch.arange(len(rows))).item(), num_tokens)

    return prepare


def flagembedding(model: E5Model, is_bf16: bool, sub_batch_size: int, gradient_checkpointing: int = 0) -> Prepare:
    """FlagEmbedding's decoder-only embedder through its own collator and its own trainer's step."""
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderCollator
    from FlagEmbedding.finetune.embedder.decoder_only.base import (
        BiDecoderOnlyEmbedderModel,
        DecoderOnlyEmbedderTrainer,
        DecoderOnlyEmbedderTrainingArguments,
    )

    embedder = BiDecoderOnlyEmbedderModel(
        model.backbone,
        tokenizer=model.tokenizer,
        temperature=TEMPERATURE,
        sub_batch_size=sub_batch_size,
        sentence_pooling_method="last_token",
        normalize_embeddings=True,
    ).train()
    if gradient_checkpointing:
        embedder.enable_input_require_grads()
        embedder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    arguments = DecoderOnlyEmbedderTrainingArguments(tempfile.gettempdir(), bf16=is_bf16, use_cpu=True)
    trainer = DecoderOnlyEmbedderTrainer(embedder, arguments, processing_class=model.tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    prepared = trainer.accelerator.prepare(embedder)
    collate = AbsEmbedderCollator(
        model.tokenizer, query_max_len=MAX_LENGTH, passage_max_len=MAX_LENGTH, sub_batch_size=sub_batch_size
    )

    def prepare(rows: list[dict]) -> Step:
        batch = collate([([_query(row)], [row["positive"], row["negative"]], None) for row in rows])
        parts = [*batch["queries"], *batch["passages"]]
        num_tokens = sum(int(part["attention_mask"].sum()) for part in parts)
        return Step(lambda: trainer.training_step(prepared, batch).item(), num_tokens)

    return prepare


SIDES: dict[str, Callable[..., Prepare]] = {
    "hf-e5": hf_e5,
    "sentence-transformers": sentence_transformers,
    "gradcache": gradcache,
    "flagembedding": flagembedding,
}
# The settings that are tried for each peer; the best one counts.
PEER_SETTINGS = {
    "sentence-transformers": (
        "mini_batch_size=4",
        "mini_batch_size=8",
        "mini_batch_size=16",
        "mini_batch_num_tokens=2048",
    ),
    "gradcache": ("chunk_size=2", "chunk_size=4", "chunk_size=8", "chunk_size=16"),
    "flagembedding": (
        "sub_batch_size=4",
        "sub_batch_size=8",
        "sub_batch_size=4,gradient_checkpointing=1",
        "sub_batch_size=8,gradient_checkpointing=1",
    ),
}


def _accelerator(is_bf16: bool) -> Accelerator:
    return Accelerator(cpu=True, mixed_precision="bf16" if is_bf16 else "no")


def _query(row: dict) -> str:
    return format_query(row["query"], row["instruction"])
