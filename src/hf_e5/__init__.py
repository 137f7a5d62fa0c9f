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
    "SyntheticTriplets": "hf_e5.data.build",
    "build_dataset": "hf_e5.data.build",
    "export_sentence_transformer": "hf_e5.export.sentence_transformer",
    "filter_records": "hf_e5.filters.run",
    "info_nce": "hf_e5.training.losses",
    "load_mixture": "hf_e5.data.mixture",
    "mine_hard_negatives": "hf_e5.data.mining.mine",
    "push_to_hub": "hf_e5.hub",
    "synthesize": "hf_e5.synthesis.pipeline",
    "verify_export": "hf_e5.export.verify",
}

__all__ = list(_EXPORTS)

# For type checkers and editors; `as` marks what they may hand on.
if TYPE_CHECKING:
    from .data.build import SyntheticTriplets as SyntheticTriplets
    from .data.build import build_dataset as build_dataset
    from .data.collator import E5DataCollator as E5DataCollator
    from .data.mining.mine import mine_hard_negatives as mine_hard_negatives
    from .data.mixture import load_mixture as load_mixture
    from .export.sentence_transformer import export_sentence_transformer as export_sentence_transformer
    from .export.verify import verify_export as verify_export
    from .filters.run import filter_records as filter_records
    from .hub import push_to_hub as push_to_hub
    from .modeling.encoder import E5Model as E5Model
    from .synthesis.pipeline import synthesize as synthesize
    from .training.arguments import E5TrainingArguments as E5TrainingArguments
    from .training.losses import info_nce as info_nce
    from .training.trainer import E5Trainer as E5Trainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
