"""hf-e5: text embeddings from decoder LLMs with LLM-written data (arXiv 2401.00368).

The public names below are imported on first use, so that `import hf_e5` is instant and needs no extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "E5DataCollator": "hf_e5.data.collator",
    "E5Model": "hf_e5.modeling.encoder",
    "E5Trainer": "hf_e5.training.trainer",
    "E5TrainingArguments": "hf_e5.training.arguments",
    "SyntheticTriplets": "hf_e5.data.builder",
    "build_dataset": "hf_e5.data.build",
    "export_sentence_transformer": "hf_e5.export.sentence_transformer",
    "info_nce": "hf_e5.training.losses",
    "synthesize": "hf_e5.synthesis.pipeline",
    "verify_export": "hf_e5.export.verify",
}

__all__ = [
    "E5DataCollator",
    "E5Model",
    "E5Trainer",
    "E5TrainingArguments",
    "SyntheticTriplets",
    "build_dataset",
    "export_sentence_transformer",
    "info_nce",
    "synthesize",
    "verify_export",
]

if TYPE_CHECKING:
    from .data.build import build_dataset
    from .data.builder import SyntheticTriplets
    from .data.collator import E5DataCollator
    from .export.sentence_transformer import export_sentence_transformer
    from .export.verify import verify_export
    from .modeling.encoder import E5Model
    from .synthesis.pipeline import synthesize
    from .training.arguments import E5TrainingArguments
    from .training.losses import info_nce
    from .training.trainer import E5Trainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
