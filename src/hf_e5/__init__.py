"""hf-e5: text embeddings from decoder LLMs with LLM-written data (arXiv 2401.00368).

The public names below are imported on first use, so that `import hf_e5` is instant and needs no extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Public name: module.
_MODULES = {
    "E5DataCollator": "data.collator",
    "E5Model": "modeling.encoder",
    "E5Trainer": "training.trainer",
    "E5TrainingArguments": "training.arguments",
    "SyntheticTriplets": "data.build",
    "build_dataset": "data.build",
    "export_sentence_transformer": "export.sentence_transformer",
    "filter_records": "filters.run",
    "info_nce": "training.losses",
    "load_mixture": "data.mixture",
    "mine_hard_negatives": "data.mining.mine",
    "push_to_hub": "hub",
    "synthesize": "synthesis.pipeline",
    "verify_export": "export.verify",
}
__all__ = list(_MODULES)

# The same for type checkers, editors and the documentation, which do not run the code below.
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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
