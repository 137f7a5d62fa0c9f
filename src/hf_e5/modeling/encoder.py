"""E5Model: a decoder LLM that turns a text into one unit vector (paper, section 3.2)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..instructions import format_query
from .backbone import adapter_base, load_backbone, read_json, require_adapter_loaded, split_gguf
from .packed.decoder import pack_forward
from .packed.layout import Pack
from .packed.micro_batches import forward_batches
from .pooling import POOLINGS, pool
from .tokenizer import load_tokenizer, tokenize


# What a checkpoint's own files do not say: pooling, normalisation, and the GGUF file the base came from.
CONFIG_NAME = "e5_config.json"

# Texts that `encode` tokenises and sorts at a time.
ENCODE_TEXTS = 8192

# `encode` changes the model's mode, its attention and its tokenizer's truncation for a while: one call at a time. The
# locks are no attributes, as a model with a lock could not be copied.
_LOCKS: WeakKeyDictionary[E5Model, Lock] = WeakKeyDictionary()


class E5Model(nn.Module):
    """A transformer, its tokenizer, pooling and normalisation.

    Args:
        backbone: Decoder or encoder without a head, or a `PeftModel` around one.
        tokenizer: Ends every text in EOS (`hf_e5.modeling.tokenizer.ensure_eos`).
        pooling: One of `last` (the paper), `mean`, `weighted_mean`, `first`.
        normalize: Scale vectors to unit length, in fp32.
        gguf_file: The GGUF file that the backbone came from, if any; saved with an adapter.
        instruction: What `encode_query` asks for by default: one sentence.
        max_length: Tokens after which `encode_query` and `encode_document` cut a text by default.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: str = "last",
        normalize: bool = True,
        gguf_file: str | None = None,
        instruction: str | None = None,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.gguf_file = gguf_file
        self.instruction = instruction
        self.max_length = max_length
        self.config.use_cache = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        peft_config: PeftConfig | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        gguf_file: str | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> E5Model:
        """Load a model: an adapter folder, a full checkpoint, an exported folder, a Hub id or a GGUF file.

        Args:
            name_or_path: Folder, Hub id, or path of a `.gguf` file.
            peft_config: Put a fresh adapter on the loaded model, e.g. `LoraConfig(...)`.
            pooling: Defaults to what the checkpoint was saved with, else `last`.
            normalize: Likewise, else True.
            dtype: Of the backbone's weights; defaults to the checkpoint's. An adapter's weights stay fp32.
            attn_implementation: As in transformers, e.g. `sdpa`, `flash_attention_2`.
            gguf_file: Name of the GGUF file in the folder or Hub repository; it is dequantised.
            is_trainable: Go on training a loaded adapter (a fresh one always trains).
            kwargs: `revision`, `token`, `quantization_config`, ...: passed to transformers.

        Raises:
            InputError: No such model; or its tokenizer has no EOS; or an adapter does not fit its base, or its target
                modules are not found.
        """
        name, gguf_file = split_gguf(name_or_path, gguf_file)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        saved = read_json(name, CONFIG_NAME, **hub) or {}
        base = adapter_base(name, **hub)
        if base is None:
            options, tokenizer_source = kwargs, name
        else:
            # A revision given for the adapter says nothing about its base.
            options = {key: value for key, value in kwargs.items() if key != "revision"}
            has_tokenizer = read_json(name, "tokenizer_config.json", **hub) is not None
            tokenizer_source = name if has_tokenizer else base
            name, gguf_file = split_gguf(base, gguf_file or saved.get("gguf_file"))
        gguf = {"gguf_file": gguf_file} if gguf_file else {}
        bare = load_backbone(name, dtype=dtype, attn_implementation=attn_implementation, **options, **gguf)
        backbone: PreTrainedModel | PeftModel = bare
        if base is not None:
            if peft_config is not None:
                raise InputError(f"{name_or_path} is an adapter already: leave out peft_config, or merge it first")
            backbone = PeftModel.from_pretrained(bare, str(name_or_path), is_trainable=is_trainable, **hub)
            require_adapter_loaded(backbone, name_or_path)
        elif peft_config is not None:
            if kwargs.get("quantization_config") is not None:
                bare = prepare_model_for_kbit_training(bare, use_gradient_checkpointing=False)
            try:
                backbone = get_peft_model(bare, copy.deepcopy(peft_config))  # peft writes module names into it
            except ValueError as error:
                reason = str(error).strip().split("\n", 1)[0]
                raise InputError(f"cannot put an adapter on {name_or_path}: {reason}") from error
        tokenizer = load_tokenizer(tokenizer_source, **hub, **(gguf if tokenizer_source == name else {}))
        exported = saved.get("export", {})
        return cls(
            backbone,
            tokenizer,
            pooling=pooling or saved.get("pooling", "last"),
            normalize=saved.get("normalize", True) if normalize is None else normalize,
            gguf_file=gguf_file,
            instruction=exported.get("instruction"),
            max_length=exported.get("max_seq_length", 512),
        )

    @property
    def config(self) -> Any:
        """The backbone's config (also what DeepSpeed reads `hidden_size` from)."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def is_peft(self) -> bool:
        """Whether an adapter is trained on a frozen base."""
        return isinstance(self.backbone, PeftModel)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *, pack: Pack | None = None
    ) -> Tensor:
        """Embed a padded batch or a pack.

        Args:
            input_ids: Token ids, [batch, tokens], int64. Pad on the right; on the left only with rotary positions.
            attention_mask: 1 for tokens and 0 for padding, [batch, tokens].
            pack: Instead of both: texts laid flat (where `supports_packing` says so).

        Returns:
            [batch, dim], fp32, unit norm unless `normalize` is off; for a pack in the order of its texts.
        """
        if pack is not None:
            return self._finish(pack_forward(self.backbone, pack, self.pooling))
        assert attention_mask is not None
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self._finish(pool(hidden, attention_mask, self.pooling))

    def _finish(self, pooled: Tensor) -> Tensor:
        # fp32 also under autocast: at temperature 0.02 a bf16 rounding error is amplified fifty-fold.
        pooled = pooled.float()
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        max_length: int = 512,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Embed texts for use; a call from another thread waits for its turn.

        Args:
            texts: One text or several.
            instruction: For queries: the task in one sentence. Documents take none (paper, section 3.2).
            max_length: Tokens after which a text is cut, EOS included.
            batch_size: Texts of one forward; by default as many as fit 8,192 tokens.
            show_progress: Show a progress bar.

        Returns:
            [n, dim] fp32 on the CPU, in the order of `texts`; [dim] for a single text.
        """
        if isinstance(texts, str):
            return self.encode([texts], instruction=instruction, max_length=max_length)[0]
        texts = list(texts)
        # By characters, as tokenising everything first would need far more memory than the vectors do.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors: Tensor | None = None
        with (
            _LOCKS.setdefault(self, Lock()),
            self.evaluating(),
            tqdm(total=len(texts), desc="encode", disable=not show_progress) as bar,
        ):
            for start in range(0, len(order), ENCODE_TEXTS):
                window = order[start : start + ENCODE_TEXTS]
                ids = tokenize(self.tokenizer, [format_query(texts[i], instruction) for i in window], max_length)
                for batch in forward_batches(self.backbone, ids, pooling=self.pooling, batch_size=batch_size):
                    with torch.inference_mode():  # only here: the result is a tensor that autograd can use
                        out = self(**batch.inputs).cpu()
                    if vectors is None:
                        vectors = torch.empty(len(texts), out.shape[1])
                    vectors[[window[place] for place in batch.texts.tolist()]] = out
                    bar.update(len(out))
        return torch.empty(0, self.config.get_text_config().hidden_size) if vectors is None else vectors

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Embed queries, as `SentenceTransformer.encode_query` does.

        Args:
            texts: One query or several.
            instruction: The task in one sentence; "" for none. Defaults to the one the model was exported with.
            max_length: Defaults to the length the model was exported with, else 512.
            batch_size: As in `encode`.
            show_progress: As in `encode`.

        Returns:
            As `encode`.

        Raises:
            InputError: No instruction is given, and the model was not exported with one.
        """
        if instruction is None:
            instruction = self.instruction
        if instruction is None:
            raise InputError('the model was not exported with an instruction: pass instruction=..., or "" for none')
        length = max_length or self.max_length
        return self.encode(
            texts, instruction=instruction, max_length=length, batch_size=batch_size, show_progress=show_progress
        )

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        max_length: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Embed documents, which carry no instruction; the arguments are those of `encode_query`."""
        length = max_length or self.max_length
        return self.encode(texts, max_length=length, batch_size=batch_size, show_progress=show_progress)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode (no dropout) inside the block, whatever it was before restored after."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass.

        Always non-reentrant, the form that works with frozen inputs, DDP and ZeRO; the inputs are made to require
        gradients all the same, so that a LoRA layer below the first checkpoint never goes untrained. `options` as in
        transformers: `every_n_layers`, `offload` (not in the fused layers).
        """
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        self.backbone.enable_input_require_grads()
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)

    def save_pretrained(self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapter (or the full weights), the tokenizer and `e5_config.json` into folder `path`.

        Args:
            path: Made if missing.
            state_dict: Weights gathered elsewhere (ZeRO-3, FSDP), with this module's names.
        """
        options: dict[str, Any] = {}
        if state_dict is not None:
            options["state_dict"] = {name.removeprefix("backbone."): value for name, value in state_dict.items()}
        if self.is_peft:
            options["save_embedding_layers"] = False  # the vocabulary is never resized; "auto" would ask the Hub
        self.backbone.save_pretrained(str(path), **options)
        self.tokenizer.save_pretrained(path)
        config = {"pooling": self.pooling, "normalize": self.normalize}
        if self.gguf_file and self.is_peft:
            config["gguf_file"] = self.gguf_file
        (Path(path) / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
