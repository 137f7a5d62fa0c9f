"""`SyntheticTriplets`: synthetic records as a Hugging Face dataset (paper, section 3.1)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import InputError
from ..instructions import TASK_TYPES
from .records import FIELDS, check_test_size, read_records, split_of


ALL = "all"
TEST_SIZE = 0.02

# Every column is a string, also in a config without negatives, so that the files of all configs have one schema.
# Which placeholders were drawn differs by task type and by recipe: a JSON object keeps one schema for all of them.
FEATURES = datasets.Features({field: datasets.Value("string") for field in FIELDS})


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
        arguments = {split: kwargs for split, kwargs in arguments.items() if self._has_records(**kwargs)}
        if not arguments:
            raise InputError(f"{', '.join(files)}: no record of task type {self.config.name!r}")
        return [datasets.SplitGenerator(name=split, gen_kwargs=kwargs) for split, kwargs in arguments.items()]

    def _has_records(self, files: list[str], keep: str | None) -> bool:
        return next(self._generate_examples(files, keep), None) is not None

    def _generate_examples(self, files: list[str], keep: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of this configuration; with `keep`, only those that `split_of` sends to that split."""
        for file in files:
            for place, _, record in read_records(file):
                wanted = self.config.name in (ALL, record["task_type"])
                if wanted and (keep is None or split_of(record, self.config.test_size) == keep):
                    yield place, to_example(record)


def to_example(record: dict[str, Any]) -> dict[str, Any]:
    """Turn a record into a row of the dataset."""
    example = {field: record.get(field) for field in FIELDS}
    example["placeholders"] = json.dumps(record["placeholders"], ensure_ascii=False, sort_keys=True)
    return example
