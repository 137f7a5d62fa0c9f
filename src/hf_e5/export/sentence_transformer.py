"""Export: a checkpoint becomes a folder that `SentenceTransformer(folder)` loads to the very same vectors.

The layout is the one that every release of sentence-transformers, and the servers that read its files, understand:
class paths and pooling keys in their long-standing spelling, EOS in `tokenizer.json`, no chat template.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig

from ..errors import InputError
from ..instructions import BITEXT_INSTRUCTION, STS_INSTRUCTION, query_prompt
from ..modeling.backbone import ADAPTER_CONFIG, base_model_name
from ..modeling.encoder import E5Model
from .card import model_card
from .verify import VerifyReport, compare, encode_probes


logger = logging.getLogger(__name__)

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
        How far the vectors of the written folder are from the checkpoint's.

    Raises:
        InputError: `checkpoint` is not one, `out` exists, the adapter changes nothing, or the written folder does not
            give the checkpoint's vectors.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not (checkpoint / ADAPTER_CONFIG).is_file() and not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint: it holds neither {ADAPTER_CONFIG} nor config.json")
    if out.exists():
        raise InputError(f"{out} exists: remove it or choose another folder")
    model = E5Model.from_pretrained(checkpoint, dtype=torch.float32)
    backbone = model.backbone
    stored = dtype or _checkpoint_dtype(model, checkpoint)
    if isinstance(backbone, PeftModel):
        if not merge and model.gguf_file:
            raise InputError(f"{checkpoint} was trained on a GGUF file, which needs its adapter merged: use --merge")
    elif merge:
        raise InputError(f"{checkpoint} has no adapter to merge: leave out --merge")
    reference = encode_probes(model, instruction, max_seq_length)
    if isinstance(backbone, PeftModel):
        with backbone.disable_adapter():
            untrained = encode_probes(model, instruction, max_seq_length)
        if (reference - untrained).abs().max() < 1e-6:
            raise InputError(f"the adapter in {checkpoint} changes nothing: it was not trained")
        if merge:
            model.backbone = backbone.merge_and_unload(safe_merge=True)
    if not isinstance(model.backbone, PeftModel):
        model.to(stored)  # once, after everything is computed in fp32

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(model, folder, instruction, max_seq_length)
        del model, backbone  # a second copy is about to be loaded
        report = compare(folder, reference, instruction=instruction, dtype=stored)
        report.raise_if_different()
        folder.chmod(0o755)  # mkdtemp makes it private
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return report


def _write(model: E5Model, folder: Path, instruction: str, max_seq_length: int) -> None:
    model.tokenizer.model_max_length = max_seq_length
    model.save_pretrained(folder)
    card = model_card(model, instruction=instruction, max_seq_length=max_seq_length)
    (folder / "README.md").write_text(card, encoding="utf-8")
    names = ["Transformer", "Pooling", *(["Normalize"] if model.normalize else [])]
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
    pooling |= {key: name == model.pooling for name, key in _POOLING_KEYS.items()}
    prompts = {
        "query": query_prompt(instruction),
        "document": "",
        "sts_query": query_prompt(STS_INSTRUCTION),
        "bitext_query": query_prompt(BITEXT_INSTRUCTION),
    }
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    _write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    if model.normalize:
        (folder / "2_Normalize").mkdir()


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checkpoint_dtype(model: E5Model, checkpoint: Path) -> torch.dtype:
    """The dtype of the full weights on disk; fp32 for GGUF, whose weights were dequantised into it."""
    if model.gguf_file:
        return torch.float32
    source = base_model_name(model.backbone) if isinstance(model.backbone, PeftModel) else checkpoint
    return AutoConfig.from_pretrained(source).dtype or torch.float32
