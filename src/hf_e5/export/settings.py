"""What a folder was exported with, stored in its `e5_config.json`: verification does not ask the files it verifies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from ..errors import InputError
from ..instructions import BITEXT_INSTRUCTION, STS_INSTRUCTION, query_prompt
from ..modeling.encoder import CONFIG_NAME, E5Model


@dataclass(frozen=True)
class ExportSettings:
    """The choices behind an exported folder.

    Args:
        instruction: Of the default `query` prompt; documents have none.
        max_seq_length: Tokens after which a text is cut, EOS included.
        merged: Whether the adapter was added into the weights.
        dtype: Name of the dtype that merged or full weights were cast to; None for an adapter, written as trained.
        pooling: As in `E5Model`.
        normalize: As in `E5Model`.
    """

    instruction: str
    max_seq_length: int
    merged: bool
    dtype: str | None
    pooling: str
    normalize: bool

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts of the sentence-transformers folder, by name."""
        return {
            "query": query_prompt(self.instruction),
            "document": "",
            "sts_query": query_prompt(STS_INSTRUCTION),
            "bitext_query": query_prompt(BITEXT_INSTRUCTION),
        }

    def write(self, folder: Path) -> None:
        """Add the section `export` to the `e5_config.json` of `folder`, which has pooling and normalisation."""
        path = folder / CONFIG_NAME
        names = ("instruction", "max_seq_length", "merged", "dtype")
        config = {**json.loads(path.read_bytes()), "export": {name: getattr(self, name) for name in names}}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ExportSettings:
        """Read what `write` stored.

        Raises:
            InputError: The file or its section is missing (an export by an older version) or not as `write` left it.
        """
        try:
            config = json.loads((folder / CONFIG_NAME).read_bytes())
            settings = cls(pooling=config["pooling"], normalize=config["normalize"], **config["export"])
            if settings.dtype is not None and not isinstance(getattr(torch, settings.dtype), torch.dtype):
                raise TypeError(settings.dtype)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{folder}/{CONFIG_NAME} does not say how the folder was exported (older versions did not store it): "
                "export it again"
            ) from None
        return settings


def merge_and_cast(model: E5Model, settings: ExportSettings) -> None:
    """Make the weights of an fp32 `model` those of the exported folder, in place: merged and cast as `settings` say.

    Parameters only: rope's frequencies are buffers that are in no file and stay fp32 when a folder is loaded.

    Raises:
        InputError: `model` has no adapter to merge, or one that was not merged although the weights were cast.
    """
    backbone = model.backbone
    if settings.merged:
        if not isinstance(backbone, PeftModel):
            raise InputError("there is no adapter to merge: the checkpoint holds full weights")
        model.backbone = backbone.merge_and_unload(safe_merge=True)
    if settings.dtype is None:
        return
    if model.is_peft:
        raise InputError(
            f"the weights were cast to {settings.dtype}, but the checkpoint is an adapter: not its export"
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, settings.dtype))
