"""E5Trainer: transformers' Trainer with a contrastive step."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import speed_metrics

from ..data.collator import E5DataCollator
from ..data.sampler import TaskBatchSampler, group_rows, hash_texts
from ..data.tokenization import tokenize_dataset
from ..errors import InputError
from ..modeling.backbone import require_adapter_loaded
from ..modeling.encoder import E5Model
from .arguments import E5TrainingArguments
from .callbacks import LogTable, LoraGradientCheck
from .evaluator import evaluate_retrieval
from .gradcache import ContrastiveStep


logger = logging.getLogger(__name__)


class E5Trainer(Trainer):
    """Train an `E5Model` with InfoNCE over in-batch and hard negatives (paper, section 3.2).

    Args:
        model: The model, with an adapter (only the adapter trains and is saved) or without (all weights do).
        args: Batch size, learning rate and the rest.
        train_dataset: Columns `query`, `positive`, and optionally `instruction` and `negative` (text, list of texts or
            None); or already the token ids of `tokenize_dataset`.
        eval_dataset: Likewise, or a dict of several.
        kwargs: Passed to `transformers.Trainer`.

    Raises:
        InputError: A column is missing, a text is empty, or there are fewer rows than one batch.
    """

    model: E5Model
    args: E5TrainingArguments

    def __init__(
        self, model: E5Model, args: E5TrainingArguments, train_dataset: Any = None, eval_dataset: Any = None, **kwargs
    ) -> None:
        self._tokenizer, self._max_lengths = model.tokenizer, (args.query_max_length, args.passage_max_length)
        self._batch_sampler = _batch_sampler(train_dataset, args)
        with args.main_process_first(desc="tokenising"):
            train_dataset = self._tokenize(train_dataset)
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: self._tokenize(dataset) for name, dataset in eval_dataset.items()}
            else:
                eval_dataset = self._tokenize(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", E5DataCollator()),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.tokenizer,
            **kwargs,
        )
        self.add_callback(LoraGradientCheck())
        for printer in (ProgressCallback, PrinterCallback):
            if self.pop_callback(printer) is not None:
                self.add_callback(LogTable())
        self._step: ContrastiveStep | None = None
        self._statistics: dict[str, list[Tensor]] = {}  # of the steps since the last log, on the device
        self._tokens = 0
        self._since = time.perf_counter()

    def _tokenize(self, dataset: Any) -> Any:
        if dataset is None or "query_ids" in dataset.column_names:
            return dataset
        query, passage = self._max_lengths
        return tokenize_dataset(dataset, self._tokenizer, query_max_length=query, passage_max_length=passage)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            _complete_fsdp_plugin(self.accelerator.state.fsdp_plugin, self.model.backbone)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one task each, the same plan on every process (`hf_e5.data.sampler.TaskBatchSampler`)."""
        if self._batch_sampler is None:
            return super().get_train_dataloader()
        # Not through accelerator.prepare: the sampler knows the processes already and must not be sharded again.
        return DataLoaderShard(
            self.train_dataset,
            batch_sampler=self._batch_sampler,
            collate_fn=self.data_collator,
            device=self.accelerator.device,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch; returns its loss, divided by the accumulation steps."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self._step is None or self._step.model is not model:
            self._step = ContrastiveStep(
                model,
                self.args.objective(),
                self.accelerator,
                mini_batch_num_tokens=self.args.mini_batch_num_tokens,
                keep_graph_num_tokens=self.args.kept_tokens(),
            )
        scale = 1 / self.current_gradient_accumulation_steps
        output = self._step(inputs, loss_scale=scale)
        for name, value in output.statistics.items():
            self._statistics.setdefault(name, []).append(value)
        self._tokens += inputs["input_ids"].numel()
        return output.loss.detach() * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a training log what tells whether the run is sound (docs/training.md), as means over all devices."""
        if "loss" in logs and self._statistics:
            means = torch.stack([torch.stack(values).float().mean() for values in self._statistics.values()])
            means = self.accelerator.reduce(means.to(self.args.device), reduction="mean")
            logs.update(zip(self._statistics, means.tolist(), strict=True))
            self._statistics.clear()
            tokens = self.accelerator.reduce(torch.tensor(float(self._tokens), device=self.args.device))
            now = time.perf_counter()
            logs["tokens_per_second"] = tokens.item() / (now - self._since)
            self._tokens, self._since = 0, now
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rank the evaluation set's corpus for its queries (`evaluate_retrieval`); logs and returns the metrics."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if dataset is None:
            raise InputError("there is no evaluation set: pass eval_dataset")
        started = time.time()
        dataset = self._tokenize(dataset)
        results = evaluate_retrieval(
            self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model,
            dataset,
            self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            temperature=self.args.temperature,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since = time.perf_counter()  # the time spent here is not training time
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card that `push_to_hub` needs; transformers cannot tell what an `E5Model` started from."""
        kwargs.setdefault("finetuned_from", self.model.config.name_or_path)
        kwargs.setdefault("tags", ["hf-e5", "feature-extraction", "sentence-similarity"])
        super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(folder, state_dict=state_dict)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        backbone = self.model.backbone
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model=self.model)
        elif isinstance(backbone, PeftModel):
            require_adapter_loaded(backbone, resume_from_checkpoint)
            set_peft_model_state_dict(backbone, load_peft_weights(resume_from_checkpoint, device="cpu"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model=backbone)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _complete_fsdp_plugin(plugin: Any, backbone: Any) -> None:
    """Fill in what accelerate cannot know of an `E5Model`, before it shards the model."""
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise InputError("FSDP would save no model that can be loaded: set fsdp_state_dict_type: FULL_STATE_DICT")
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(backbone._no_split_modules)
    if plugin.mixed_precision_policy is not None:
        # Vectors leave the model in fp32; by default they would be rounded to the precision of the layers.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)


def _batch_sampler(dataset: Any, args: E5TrainingArguments) -> TaskBatchSampler | None:
    """The plan of a training set's batches; None where another order of rows is asked for."""
    if dataset is None or args.train_sampling_strategy != "random":
        return None
    columns = [name for name in ("dataset", "task_type") if name in dataset.column_names]
    groups, names = group_rows(dataset, columns) if columns else (np.zeros(len(dataset), dtype=np.int64), ["all"])
    rows = args.train_batch_size * args.world_size
    if args.homogeneous_batches and args.dataloader_drop_last:
        for name, count in zip(names, np.bincount(groups, minlength=len(names)), strict=True):
            if count < rows:
                logger.warning(
                    "%s has %d rows, fewer than a batch of %d: none of them is trained on", name, count, rows
                )
    return TaskBatchSampler(
        groups,
        args.train_batch_size,
        texts=hash_texts(dataset) if "query" in dataset.column_names else None,
        world_size=args.world_size,
        rank=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        homogeneous=args.homogeneous_batches,
        drop_last=args.dataloader_drop_last,
    )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in `output_dir`, or None.

    A run that was killed while it saved leaves a folder whose trainer state, which is written last, is missing or
    torn; it is passed over.
    """
    found = []
    for state in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        try:
            found.append((int(json.loads(state.read_text(encoding="utf-8"))["global_step"]), str(state.parent)))
        except (ValueError, KeyError):
            logger.warning("passing over %s: it was not saved completely", state.parent)
    return max(found)[1] if found else None
