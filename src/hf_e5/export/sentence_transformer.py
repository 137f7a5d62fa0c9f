"""Export: a checkpoint becomes a folder that `SentenceTransformer(folder)` loads to the very same vectors.

The layout is the one that every release of sentence-transformers, and the servers that read its files, understand:
class paths and pooling keys in their long-standing spelling, EOS in `tokenizer.json`, no chat template.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig

from ..errors import InputError
from ..files import whole_folder
from ..modeling.backbone import ADAPTER_CONFIG, base_model_name
from ..modeling.encoder import E5Model
from .card import model_card
from .settings import ExportSettings, merge_and_cast
from .verify import TEXTS, Probes, VerifyReport, compare, encode_finite


DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

_POOLING_KEYS = {
    "first": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",  # not ours, but readers of the file expect every key
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


def export_sentence_transformer(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    instruction: str = DEFAULT_INSTRUCTION,
    max_seq_length: int = 512,
    dtype: torch.dtype | None = None,
) -> VerifyReport:
    """Write `checkpoint` as a sentence-transformers folder, and check it by loading it.

    Args:
        checkpoint: Adapter folder or full checkpoint.
        out: Folder to make; it must not exist. Nothing is left behind if anything fails.
        merge: Add the adapter into the weights (computed in fp32, cast once), so that the folder needs no base model.
        instruction: Of the default `query` prompt; documents have none.
        max_seq_length: Tokens after which a text is cut, EOS included.
        dtype: Of merged or full weights; the base checkpoint's if unset.

    Returns:
        How near the written folder is to the model that was written (fidelity), and that to the checkpoint (drift).

    Raises:
        InputError: `checkpoint` is not one, `out` exists, the adapter changes nothing, `dtype` is given for an adapter
            that is not merged, or the written folder does not give the vectors of the model that was written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not (checkpoint / ADAPTER_CONFIG).is_file() and not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint: it holds neither {ADAPTER_CONFIG} nor config.json")
    if out.exists():
        raise InputError(f"{out} exists: remove it or choose another folder")
    model = E5Model.from_pretrained(checkpoint, dtype=torch.float32)
    _check_options(model, checkpoint, merge, max_seq_length, dtype)
    stored = None if model.is_peft and not merge else dtype or _checkpoint_dtype(model, checkpoint)
    settings = ExportSettings(
        instruction=instruction,
        max_seq_length=max_seq_length,
        merged=merge,
        dtype=str(stored).removeprefix("torch.") if stored else None,
        pooling=model.pooling,
        normalize=model.normalize,
    )
    probes = Probes.of(model.tokenizer, settings)
    trained = encode_finite(probes, model, str(checkpoint))
    merge_and_cast(model, settings)

    with whole_folder(out) as folder:
        _write(model, folder, settings)
        reference = trained
        if settings.dtype is not None:
            reference = encode_finite(probes, model.float(), f"{checkpoint} cast to {settings.dtype}")
        del model  # a second copy is about to be loaded
        report = replace(compare(folder, probes, reference, probes.drift(trained, reference)), folder=out)
        report.raise_if_different()
    return report


def _check_options(
    model: E5Model, checkpoint: Path, merge: bool, max_seq_length: int, dtype: torch.dtype | None
) -> None:
    special = model.tokenizer.num_special_tokens_to_add()
    if max_seq_length <= special:
        raise InputError(f"max_seq_length {max_seq_length} leaves no token for text: give at least {special + 1}")
    backbone = model.backbone
    if not isinstance(backbone, PeftModel):
        if merge:
            raise InputError(f"{checkpoint} has no adapter to merge: leave out merge")
        return
    if not merge and model.gguf_file:
        raise InputError(f"{checkpoint} was trained on a GGUF file, which needs its adapter merged: use merge")
    if not merge and dtype is not None:
        raise InputError("an adapter that is not merged is written as it was trained: leave out dtype, or use merge")
    with backbone.disable_adapter():
        untrained = model.encode(TEXTS)
    if (model.encode(TEXTS) - untrained).abs().max() < 1e-6:
        raise InputError(f"the adapter in {checkpoint} changes nothing: it was not trained")


def _write(model: E5Model, folder: Path, settings: ExportSettings) -> None:
    model.tokenizer.model_max_length = settings.max_seq_length
    model.save_pretrained(folder)
    settings.write(folder)
    # How the model was run and the tokenizer was found here; neither is the reader's concern.
    _remove_key(folder / "config.json", "use_cache")
    _remove_key(folder / "tokenizer_config.json", "local_files_only")
    card = model_card(model, instruction=settings.instruction, max_seq_length=settings.max_seq_length)
    (folder / "README.md").write_text(card, encoding="utf-8")
    names = ["Transformer", "Pooling", *(["Normalize"] if settings.normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{name}" if index else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(names)
    ]
    pooling = {"word_embedding_dimension": model.config.get_text_config().hidden_size}
    pooling |= {key: name == settings.pooling for name, key in _POOLING_KEYS.items()}
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": settings.max_seq_length, "do_lower_case": False},
    )
    _write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": settings.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    if settings.normalize:
        (folder / "2_Normalize").mkdir()
    for path in folder.rglob("*"):
        if path.is_file():  # safetensors makes its files private
            path.chmod(folder.stat().st_mode & 0o666)


def _remove_key(path: Path, key: str) -> None:
    if path.is_file():
        content = json.loads(path.read_bytes())
        content.pop(key, None)
        _write_json(path, content)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checkpoint_dtype(model: E5Model, checkpoint: Path) -> torch.dtype:
    """The dtype of the full weights on disk; fp32 for GGUF, whose weights were dequantised into it."""
    if model.gguf_file:
        return torch.float32
    source = base_model_name(model.backbone) if isinstance(model.backbone, PeftModel) else checkpoint
    return AutoConfig.from_pretrained(source).dtype or torch.float32
