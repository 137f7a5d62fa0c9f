"""`hf-e5 build`: records become a dataset folder that is ready for the Hub.

    OUT/README.md                                    the card; its YAML says which files make which config and split
    OUT/data/{task type}/{split}-00000-of-00001.parquet
    OUT/figures/*.png                                shares of task types and languages (paper, figure 2)

Records are streamed: a first pass checks them and parts them by task type and split, then each part is written. The
config `all` is no copy: it lists the files of every task type.
"""

from __future__ import annotations

import argparse
import glob
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import DatasetInfo
from datasets.utils.py_utils import convert_file_size_to_int
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import whole_folder
from ..instructions import TASK_TYPES
from .builder import TEST_SIZE, SyntheticTriplets
from .card import write_card
from .provenance import read_provenance
from .records import RecordCounts, check_test_size, find_record_files, read_records, split_of


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


def _part_records(files: Sequence[Path], folder: Path, test_size: float) -> RecordCounts:
    """Check all records, count them, and copy each line to `folder/{task type}-{split}.jsonl`."""
    counts = RecordCounts()
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
    return next(place for number, place in enumerate(places) if number == position)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", help="record files (JSONL), or folders written by `hf-e5 synthesize`")
    parser.add_argument("out", metavar="OUT", help="dataset folder to write; must not exist")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="licence identifier of the Hub, such as mit or cc-by-4.0"
    )
    parser.add_argument(
        "--test_size",
        type=float,
        default=TEST_SIZE,
        help="share of the tasks in the test split (default: %(default)s)",
    )
    parser.add_argument(
        "--max_shard_size", default="500MB", help="most text in one parquet file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    infos = build_dataset(
        args.records,
        args.out,
        license=args.license,
        test_size=args.test_size,
        max_shard_size=args.max_shard_size,
    )
    print(f"{'config':<14} {'train':>9} {'test':>7}")
    for name, info in infos.items():
        counts = {split: info.splits[split].num_examples if split in info.splits else 0 for split in ("train", "test")}
        print(f"{name:<14} {counts['train']:>9,} {counts['test']:>7,}")
    print(f"wrote {args.out}; load it with load_dataset({args.out!r}), read its card {args.out}/README.md, then:")
    print(f"  hf-e5 push {args.out} USER/NAME")
