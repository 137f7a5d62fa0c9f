"""What a training run can be told: the model, the data, and how to train."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

from ..data.mixture import load_mixture
from ..errors import InputError
from ..modeling.encoder import E5Model
from .losses import TEMPERATURE
from .objective import ContrastiveObjective


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """The model to start from. Names and meaning as in TRL's `ModelConfig`; defaults are the paper's."""

    INPUT_PATHS: ClassVar = ("model_name_or_path",)

    model_name_or_path: str = field(metadata={"help": "Hub id, folder, adapter folder or .gguf file"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    dtype: str | None = field(
        default=None,
        metadata={"help": "of the backbone's weights: bfloat16, float16, float32; the checkpoint's if unset"},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    pooling: str | None = field(default=None, metadata={"help": "last (default), mean, weighted_mean or first"})
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter on the frozen model"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=32, metadata={"help": "the update is scaled by alpha / r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "dropout in front of the adapter"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "names of linear layers to adapt; all-linear: every one (all seven of a Llama-like layer)"},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: 4-bit base, needs bitsandbytes and a GPU"})

    def __post_init__(self) -> None:
        targets: Any = self.lora_target_modules or "all-linear"  # YAML can also give one name, or null
        self.lora_target_modules = [targets] if isinstance(targets, str) else targets
        if self.load_in_4bit and not self.use_peft:
            raise InputError("load_in_4bit trains an adapter on a quantised base: set use_peft as well")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise InputError(f"dtype {self.dtype!r} is not one of bfloat16, float16, float32")

    def load(self) -> E5Model:
        """Load the model for training; with `use_peft`, with a fresh LoRA adapter or the loaded one unfrozen.

        Raises:
            InputError: The model is unknown or does not fit these arguments.
        """
        kwargs: dict[str, Any] = {"revision": self.model_revision} if self.model_revision else {}
        if self.load_in_4bit:
            kwargs["quantization_config"] = self._four_bit()
        return E5Model.from_pretrained(
            self.model_name_or_path,
            peft_config=self.peft_config(),
            pooling=self.pooling,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            **kwargs,
        )

    def peft_config(self) -> LoraConfig | None:
        """The LoRA configuration, or None for full fine-tuning."""
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            # The shorthand is one only outside of a list.
            target_modules="all-linear" if "all-linear" in self.lora_target_modules else self.lora_target_modules,
            bias="none",
            task_type="FEATURE_EXTRACTION",
        )

    def _four_bit(self) -> Any:
        from transformers import BitsAndBytesConfig
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise InputError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.dtype or "bfloat16"),
        )


@dataclass
class DataArguments:
    """The data to train and evaluate on."""

    INPUT_PATHS: ClassVar = ("dataset_name",)

    dataset_name: str = field(
        metadata={"help": "mixture YAML, folder written by `hf-e5 build`, Hub id, .jsonl or .parquet file"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration, e.g. a task type"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "split for evaluation (with eval_strategy)"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on this many rows, drawn at random"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on this many rows, drawn at random"}
    )

    def load_train(self) -> Dataset:
        """Load the training rows (`hf_e5.data.mixture.load_mixture`)."""
        return self._load(self.dataset_train_split, self.max_train_samples)

    def load_eval(self) -> Dataset:
        """Load the evaluation rows."""
        return self._load(self.dataset_test_split, self.max_eval_samples)

    def _load(self, split: str, max_rows: int | None) -> Dataset:
        # With several processes the first one reads, the others take its cache.
        with PartialState().main_process_first():
            return load_mixture(self.dataset_name, config=self.dataset_config, split=split, max_rows=max_rows)


@dataclass
class E5TrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the contrastive step's settings and the paper's defaults.

    `per_device_train_batch_size` is the contrastive batch of one device, whatever its memory: the step cuts it into
    micro-batches of `mini_batch_num_tokens` by itself. Gradient accumulation adds no negatives, so it is not the way
    to a larger batch.

    Raises:
        InputError: A value is out of range.
    """

    INPUT_PATHS: ClassVar = ("deepspeed",)

    temperature: float = field(default=TEMPERATURE, metadata={"help": "of InfoNCE (paper, section 3.2)"})
    query_max_length: int = field(default=512, metadata={"help": "tokens of a query, instruction and EOS included"})
    passage_max_length: int = field(default=512, metadata={"help": "tokens of a document, EOS included"})
    mini_batch_num_tokens: int = field(default=16384, metadata={"help": "token budget of one forward pass"})
    keep_graph_num_tokens: str = field(
        default="auto",
        metadata={"help": "tokens whose graphs are kept instead of recomputed in the backward pass, or auto"},
    )
    homogeneous_batches: bool = field(
        default=True, metadata={"help": "rows of one dataset and task type per step, on all devices; else mixed"}
    )
    gather_across_devices: bool = field(default=True, metadata={"help": "documents of all devices are negatives"})
    mask_duplicates: bool = field(default=True, metadata={"help": "a document equal to the positive is no negative"})
    false_negative_margin: float | None = field(
        default=None, metadata={"help": "leave out negatives more similar than the positive by this cosine margin"}
    )
    matryoshka_dims: list[int] | None = field(default=None, metadata={"help": "also train these leading dimensions"})

    # Defaults that differ from transformers: the paper's (appendix A), and what a contrastive run needs.
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    warmup_steps: float = field(default=100, metadata={"help": "steps, or a share of all steps if below 1"})
    weight_decay: float = field(default=0.1, metadata={"help": "of AdamW"})
    logging_steps: float = field(default=10, metadata={"help": "steps, or a share of all steps if below 1"})
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "leave out the last batch of an epoch if it is smaller: its loss is not comparable"},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "kept off: the collator reads all columns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0, got {self.temperature}")
        for name in ("query_max_length", "passage_max_length"):
            if getattr(self, name) < 4:
                raise InputError(f"{name} must be at least 4 tokens, got {getattr(self, name)}")
        if self.mini_batch_num_tokens < 1:
            raise InputError(f"mini_batch_num_tokens must be at least 1, got {self.mini_batch_num_tokens}")
        self.kept_tokens()
        if self.false_negative_margin is not None and not math.isfinite(self.false_negative_margin):
            raise InputError(f"false_negative_margin must be finite, got {self.false_negative_margin}")
        if self.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps=%d adds no negatives: each accumulated batch is contrasted alone. "
                "Raise per_device_train_batch_size instead; memory is bounded by mini_batch_num_tokens.",
                self.gradient_accumulation_steps,
            )

    def objective(self) -> ContrastiveObjective:
        """The loss of one step."""
        return ContrastiveObjective(
            temperature=self.temperature,
            gather_across_devices=self.gather_across_devices,
            mask_duplicates=self.mask_duplicates,
            false_negative_margin=self.false_negative_margin,
            matryoshka_dims=self.matryoshka_dims,
        )

    def kept_tokens(self) -> int | Literal["auto"]:
        """`keep_graph_num_tokens` as the step takes it; the field is text, as flags and YAML give either kind."""
        if self.keep_graph_num_tokens == "auto":
            return "auto"
        try:
            return int(self.keep_graph_num_tokens)
        except ValueError:
            raise InputError(
                f"keep_graph_num_tokens must be a number or auto, got {self.keep_graph_num_tokens!r}"
            ) from None
