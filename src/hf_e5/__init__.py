"""hf-e5: text embeddings from decoder LLMs with LLM-written data (arXiv 2401.00368).

The public names below are imported on first use, so that `import hf_e5` is instant and needs no extra.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# For type checkers, editors and `_MODULES`; `as` marks what they may hand on.
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


# Public name -> module, read off the imports above, which Python itself never runs.
_MODULES = {
    alias.name: f"{__name__}.{node.module}"
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.level == 1
    for alias in node.names
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
