"""Loading a backbone: a checkpoint, a GGUF file or a LoRA adapter on either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import AutoModel, GgufConfig, PreTrainedModel

from ..errors import InputError


ADAPTER_CONFIG = "adapter_config.json"


def split_gguf(name_or_path: str | Path, gguf_file: str | None) -> tuple[str, str | None]:
    """Accept `/models/some.gguf` as a model name: return the folder and the file name that transformers expects."""
    path = Path(name_or_path)
    if gguf_file is None and path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    return str(name_or_path), gguf_file


def load_backbone(
    name_or_path: str, *, dtype: torch.dtype | str | None, attn_implementation: str | None, **kwargs: Any
) -> PreTrainedModel:
    """Load the bare transformer (no language-model head) behind `AutoModel`.

    Raises:
        InputError: There is no such model, or it is an encoder-decoder.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation, **kwargs}
    options = {key: value for key, value in options.items() if value is not None}
    if kwargs.get("gguf_file"):
        options["quantization_config"] = GgufConfig(dequantize=True)  # packed blocks cannot be trained
    try:
        model = AutoModel.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"cannot load the model {name_or_path!r}: {reason}") from error
    if model.config.is_encoder_decoder:
        raise InputError(f"{name_or_path!r} is an encoder-decoder; give a decoder-only or an encoder-only model")
    if kwargs.get("gguf_file"):
        _forget_gguf(model)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # an encoder's classification pooler is never reached, which DDP takes for an error
    return model


def require_adapter_loaded(model: PeftModel, path: str | Path) -> None:
    """Check that the weights file at `path` and the adapter of `model` have the same tensors.

    peft only warns where names do not match, and the model then silently equals its base.

    Raises:
        InputError: They do not.
    """
    saved = load_peft_weights(str(path), device="cpu")
    current = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, unexpected = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if missing or unexpected:
        raise InputError(
            f"the adapter in {path} does not fit its base model: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected, e.g. {(missing + unexpected)[0]}"
        )


def read_json(name_or_path: str, file: str, **hub: Any) -> dict[str, Any] | None:
    """The content of a JSON file in a model folder or Hub repository; None if there is no such file."""
    path = Path(name_or_path) / file
    if not Path(name_or_path).is_dir():
        try:
            path = Path(hf_hub_download(name_or_path, file, **hub))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def adapter_base(name_or_path: str, **hub: Any) -> str | None:
    """The base model that an adapter (folder or Hub id) was trained on; None if it is not an adapter."""
    config = read_json(name_or_path, ADAPTER_CONFIG, **hub)
    if config is None:
        return None
    if not config.get("base_model_name_or_path"):
        raise InputError(
            f"{name_or_path}/{ADAPTER_CONFIG} names no base_model_name_or_path: add the model it was trained on"
        )
    return config["base_model_name_or_path"]


def base_model_name(model: PeftModel) -> str:
    """Folder or Hub id of the model under the adapter of `model`."""
    return str(model.peft_config["default"].base_model_name_or_path)


def _forget_gguf(model: PreTrainedModel) -> None:
    """Clear the quantisation marks of a GGUF checkpoint.

    Its weights have been dequantised into plain linear layers, yet the marks make Trainer and save_pretrained refuse.
    """
    for mark, value in {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}.items():
        setattr(model, mark, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
