"""The dataset card: README.md with the YAML that the Hub's search, its viewer and `load_dataset` read."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from .. import __version__
from ..records import TEXT_COLUMNS
from ..report.figures import plot_shares
from ..report.statistics import Statistics
from .provenance import Provenance


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
# The Hub's size categories; the first has numbers of up to three digits, each further one numbers of one digit more.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")
ALL = "all"


def write_card(
    folder: Path,
    infos: dict[str, DatasetInfo],
    counts: Statistics,
    provenance: Provenance,
    *,
    license: str,
) -> None:
    """Write `folder/README.md` for a dataset whose shards lie under `folder/data/{task type}/`.

    The same records give the same card: it holds no date and nothing of the machine.
    """
    infos = {ALL: _sum(infos), **infos}
    languages = {**counts.languages, **counts.document_languages}
    data = DatasetCardData(
        language=sorted(languages),
        license=license,
        pretty_name=folder.name,
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        multilinguality=["multilingual" if len(languages) > 1 else "monolingual"],
        source_datasets=["original"],
        size_categories=[size_category(len(counts))],
        task_categories=["text-retrieval", "sentence-similarity", "feature-extraction"],
        tags=["synthetic", "text-embeddings", "hard-negatives", "hf-e5", "arxiv:2401.00368"],
        configs=[_config(name, info) for name, info in infos.items()],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=folder.name,
        version=__version__,
        license=license,
        rows=[_row(name, info, counts) for name, info in infos.items()],
        example=list(infos)[1],
        num_records=len(counts),
        num_instructions=counts.num_instructions,
        models=counts.models.most_common(),
        languages=counts.languages.most_common(),
        provenance=provenance,
        figure=_draw(folder, counts),
    )
    (folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def _draw(folder: Path, counts: Statistics) -> str | None:
    """Draw figure 2 of the paper; return its path in the folder, or None where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        logger.warning("the card gets no figure: pip install hf-e5[synthesis]")
        return None
    (folder / "figures").mkdir()
    _, svg = plot_shares(counts.task_types, counts.languages, folder / "figures" / "shares")
    svg.unlink()  # the Hub's card shows the PNG
    return "figures/shares.png"


def _row(name: str, info: DatasetInfo, counts: Statistics) -> dict[str, Any]:
    """Return what the card's table tells of one config."""
    task_types = list(counts.task_types) if name == ALL else [name]
    lengths = [np.concatenate([counts.characters[kind, text] for kind in task_types]) for text in TEXT_COLUMNS]
    characters = [values.mean() if len(values) else None for values in lengths]
    splits = {split: info.splits[split].num_examples if split in info.splits else 0 for split in ("train", "test")}
    return {"name": name, **splits, "negatives": len(lengths[2]) / len(lengths[0]), "characters": characters}


def _config(name: str, info: DatasetInfo) -> dict[str, Any]:
    """Say which files make a config. `all` has no files of its own: it lists those of every task type."""
    folder = "*" if name == ALL else name
    config: dict[str, Any] = {
        "config_name": name,
        "data_files": [{"split": split, "path": f"data/{folder}/{split}-*.parquet"} for split in info.splits],
    }
    return config | {"default": True} if name == ALL else config


def _sum(infos: dict[str, DatasetInfo]) -> DatasetInfo:
    """Return the info of the config `all`."""
    splits = SplitDict()
    for name in ("train", "test"):
        if parts := [info.splits[name] for info in infos.values() if name in info.splits]:
            sums = {field: sum(getattr(part, field) for part in parts) for field in ("num_bytes", "num_examples")}
            splits.add(SplitInfo(name=name, **sums))
    return DatasetInfo(
        features=next(iter(infos.values())).features,
        splits=splits,
        download_size=sum(info.download_size for info in infos.values()),
        dataset_size=sum(info.dataset_size for info in infos.values()),
    )


def size_category(num_rows: int) -> str:
    """Return the Hub's name for a number of rows."""
    return SIZES[min(max(len(str(num_rows)) - 3, 0), len(SIZES) - 1)]
