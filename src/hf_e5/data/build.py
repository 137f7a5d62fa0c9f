"""Records become a dataset folder that is ready for the Hub (paper, section 3.1).

    OUT/README.md                                    the card; its YAML says which files make which config and split
    OUT/data/{task type}/{split}-00000-of-00001.parquet
    OUT/figures/*.png                                shares of task types and languages (paper, figure 2)

Records are streamed: a first pass checks them and parts them by task type and split, then each part is written. The
config `all` is no copy: it lists the files of every task type.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets import DatasetInfo
from datasets.exceptions import DatasetGenerationError
from datasets.utils.py_utils import convert_file_size_to_int
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import whole_folder
from ..instructions import TASK_TYPES
from ..records import RECORD_COLUMNS, check_test_size, find_record_files, read_records, split_of
from ..report.statistics import Statistics
from .card import ALL, write_card
from .provenance import read_provenance


TEST_SIZE = 0.02

# Every column is a string, also in a config without negatives, so that the files of all configs have one schema.
# Which placeholders were drawn differs by task type and by recipe: a JSON object keeps one schema for all of them.
FEATURES = datasets.Features({field: datasets.Value("string") for field in RECORD_COLUMNS})


@dataclass
class SyntheticTripletsConfig(datasets.BuilderConfig):
    """What one configuration holds.

    Args:
        name: a task type, or `all`.
        test_size: share of the tasks that become the test split, from 0 (no test split) to less than 1.
        keep_splits: `data_files` says which files make which split. Set by the builder.
    """

    version: datasets.Version = datasets.Version("1.0.0")
    test_size: float = TEST_SIZE
    keep_splits: bool = False


class SyntheticTriplets(datasets.GeneratorBasedBuilder):
    """The records of one task type, or of all, as a dataset with the splits `train` and `test`.

    No instruction is in both splits; `sts` and `bitext`, which have one instruction each, are split by row. Where a
    record falls depends on its text alone. `data_files={"train": ..., "test": ...}` keeps the given splits instead.
    Records are streamed: memory does not grow with their number.

    Columns, all strings: `id, task_type, language, document_language, instruction, query, positive, negative,
    placeholders, model`. `negative` is null where there is none; `placeholders` is a JSON object with sorted keys.

    Errors in the records raise `InputError` with file, row and field.

    Example:

    ```python
    from hf_e5 import SyntheticTriplets

    builder = SyntheticTriplets(config_name="short_long", data_files="records.jsonl")
    builder.download_and_prepare()
    train = builder.as_dataset(split="train")
    ```
    """

    BUILDER_CONFIG_CLASS = SyntheticTripletsConfig
    BUILDER_CONFIGS = [SyntheticTripletsConfig(name=name) for name in (ALL, *TASK_TYPES)]
    DEFAULT_CONFIG_NAME = ALL

    def __init__(
        self, *, config_name: str = ALL, dataset_name: str = "synthetic_triplets", **builder_kwargs: Any
    ) -> None:
        if isinstance(builder_kwargs.get("data_files"), Mapping):
            if "test_size" in builder_kwargs:
                raise InputError("SyntheticTriplets: data_files names the splits; leave test_size out")
            builder_kwargs["keep_splits"] = True
        if config_name not in self.builder_configs:
            # A recipe may have task types of its own; with no known names, `datasets` makes a config for any name.
            self.BUILDER_CONFIGS = []
        super().__init__(config_name=config_name, dataset_name=dataset_name, **builder_kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Text-embedding triplets written by a large language model, after arXiv 2401.00368.",
            features=FEATURES,
        )

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().download_and_prepare(*args, **kwargs)
        except DatasetGenerationError as error:
            # `datasets` wraps what a generator raises; a wrong record shall say so itself.
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            raise

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        if not self.config.data_files:
            raise InputError("SyntheticTriplets: pass the record files as data_files")
        given = {split: list(paths) for split, paths in dl_manager.download(self.config.data_files).items()}
        files = [path for paths in given.values() for path in paths]
        arguments: dict[str, dict[str, Any]]
        if self.config.keep_splits:
            arguments = {split: {"files": paths, "keep": None} for split, paths in given.items()}
        else:
            check_test_size(self.config.test_size)
            arguments = {split: {"files": files, "keep": split} for split in ("train", "test")}
        # An empty split would be a trap for whoever loads it.
        arguments = {split: kwargs for split, kwargs in arguments.items() if any(self._generate_examples(**kwargs))}
        if not arguments:
            raise InputError(f"{', '.join(files)}: no record of task type {self.config.name!r}")
        return [datasets.SplitGenerator(name=split, gen_kwargs=kwargs) for split, kwargs in arguments.items()]

    def _generate_examples(self, files: list[str], keep: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of this configuration; with `keep`, only those that `split_of` sends to that split."""
        for file in files:
            for place, _, record in read_records(file):
                wanted = self.config.name in (ALL, record["task_type"])
                if wanted and (keep is None or split_of(record, self.config.test_size) == keep):
                    yield place, to_example(record)


def to_example(record: dict[str, Any]) -> dict[str, Any]:
    """Turn a record into a row of the dataset."""
    example = {field: record.get(field) for field in RECORD_COLUMNS}
    example["placeholders"] = json.dumps(record["placeholders"], ensure_ascii=False, sort_keys=True)
    return example


def build_dataset(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    license: str = "unknown",
    test_size: float = TEST_SIZE,
    max_shard_size: str = "500MB",
) -> dict[str, DatasetInfo]:
    """Write the dataset of `sources` to the new folder `out`, whole or not at all.

    Args:
        sources: record files or folders of synthesis runs (see `find_record_files`).
        out: folder to write; must not exist. Its name becomes the dataset's title.
        license: the Hub's identifier of the licence, such as `mit` or `cc-by-4.0`.
        test_size: share of the tasks that become the test split, from 0 to less than 1.
        max_shard_size: most bytes of text, before compression, that go into one parquet file.

    Returns:
        The info (features, splits with their numbers of rows and bytes) of each config but `all`, by task type.

    Raises:
        InputError: `out` exists, there are no records, or a record is wrong (with file, row and field).
    """
    check_test_size(test_size)
    try:
        convert_file_size_to_int(max_shard_size)
    except ValueError as error:
        raise InputError(f"max_shard_size: {error}") from None
    files = find_record_files(sources)
    provenance = read_provenance(files)
    with whole_folder(out) as folder, TemporaryDirectory(prefix=".parts.", dir=folder.parent) as temporary:
        parts = Path(temporary)
        counts = _part_records(files, parts, test_size)
        infos = {
            task_type: _write_config(task_type, parts, folder / "data" / task_type, max_shard_size)
            for task_type in sorted(counts.task_types, key=_order)
        }
        write_card(folder, infos, counts, provenance, license=license)
    return infos


def _order(task_type: str) -> tuple[int, str]:
    """The paper's task types in the paper's order, then the user's own by name."""
    return (TASK_TYPES.index(task_type) if task_type in TASK_TYPES else len(TASK_TYPES), task_type)


def _part_records(files: Sequence[Path], folder: Path, test_size: float) -> Statistics:
    """Check all records, count them, and copy each line to `folder/{task type}-{split}.jsonl`."""
    counts = Statistics()
    with ExitStack() as stack:
        num_bytes = sum(file.stat().st_size for file in files)
        bar = stack.enter_context(tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Checking records"))
        parts: dict[str, Any] = {}
        for file in files:
            for _, line, record in read_records(file):
                name = f"{record['task_type']}-{split_of(record, test_size)}.jsonl"
                if name not in parts:
                    parts[name] = stack.enter_context(open(folder / name, "wb"))
                parts[name].write(line.rstrip(b"\n") + b"\n")
                counts.add(record)
                bar.update(len(line))
    if not len(counts):
        raise InputError(f"{', '.join(map(str, files))}: no records")
    repeated = counts.first_repeated_id()
    if repeated:
        first, second = (_place(files, position) for position in repeated)
        raise InputError(f"{second}: id: the same as that of {first}; ids must be unique")
    return counts


def _place(files: Sequence[Path], position: int) -> str:
    """Return `file:row` of the record at a position."""
    places = (place for file in files for place, _, _ in read_records(file))
    return next(islice(places, position, None))


def _write_config(task_type: str, parts: Path, folder: Path, max_shard_size: str) -> DatasetInfo:
    """Write the records of one task type as `folder/{split}-00000-of-0000N.parquet`."""
    files = {split: parts / f"{task_type}-{split}.jsonl" for split in ("train", "test")}
    files = {split: file for split, file in files.items() if file.exists()}
    # `datasets` leaves locks and a dataset_info.json beside its output: it writes elsewhere, the shards are moved.
    prepared = parts / task_type
    builder = SyntheticTriplets(
        config_name=task_type,
        data_files={split: glob.escape(str(file)) for split, file in files.items()},  # `datasets` reads patterns
        cache_dir=str(parts / "cache"),
    )
    builder.download_and_prepare(str(prepared), file_format="parquet", max_shard_size=max_shard_size)
    folder.mkdir(parents=True)
    num_bytes = 0
    for split in builder.info.splits:
        shards = sorted(prepared.glob(f"*-{split}*.parquet"))
        for number, shard in enumerate(shards):
            num_bytes += shard.stat().st_size
            shutil.move(shard, folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    for file in files.values():
        file.unlink()
    builder.info.download_size = num_bytes
    return builder.info
