"""`hf-e5 mine`: give the rows of a dataset hard negatives."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from ..config import add_fields
from ..data.mining.mine import mine_hard_negatives
from ..data.mining.selection import Selection
from ..data.mixture import load_raw, load_source
from ..data.mixture_config import Source, read_mixture
from ..errors import InputError
from ..files import whole_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="data file (jsonl, parquet), folder, Hub id, or mixture YAML with --dataset")
    parser.add_argument("out", metavar="OUT", help="file to write: .jsonl or .parquet")
    parser.add_argument("--dataset", help="which dataset of a mixture to mine")
    parser.add_argument("--dataset_config", help="configuration of a single folder or Hub id, such as 'sts'")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--max_rows", type=int, help="most rows of a single dataset")
    parser.add_argument("--corpus", nargs="+", default=[], help="further documents: files with a 'text' column")

    group = parser.add_argument_group("miner")
    group.add_argument("--miner", default="intfloat/multilingual-e5-base", help="a SentenceTransformer (%(default)s)")
    group.add_argument("--query_prompt", help="prefix of queries, such as 'query: ' (default: the miner's own)")
    group.add_argument("--document_prompt", help="prefix of documents, such as 'passage: ' (default: the miner's own)")
    group.add_argument("--use_instructions", action="store_true", help="prefix each query with its row's instruction")
    group.add_argument("--max_length", type=int, help="tokens of a text (default: the miner's own)")
    group.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")
    group.add_argument("--work_dir", help="keep embeddings and rankings here (default: beside OUT, then removed)")
    add_fields(parser.add_argument_group("selection"), Selection)


def run(args: argparse.Namespace) -> None:
    selection = Selection(**{field.name: getattr(args, field.name) for field in fields(Selection)})
    source, seed = _pick(args)
    out = Path(args.out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{out}: name a .jsonl or .parquet file to write")

    from sentence_transformers import SentenceTransformer

    try:
        miner = SentenceTransformer(args.miner)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the miner {args.miner}: {str(error).splitlines()[0]}") from error
    if args.max_length is not None:
        miner.max_seq_length = args.max_length
    state = PartialState(cpu=miner.device.type == "cpu")
    with state.main_process_first():  # the others read what it cached
        dataset = load_source(source, split=args.split, seed=seed, whole=True).remove_columns("dataset")
    work = Path(args.work_dir or f"{out}.work")
    mined = mine_hard_negatives(
        dataset,
        miner,
        selection=selection,
        corpus=_corpus_texts(args.corpus),
        query_prompt=args.query_prompt,
        document_prompt=args.document_prompt,
        use_instructions=args.use_instructions,
        batch_size=args.batch_size,
        work_dir=work,
    )
    if state.is_main_process:
        _write(mined, out)
        if args.work_dir is None:
            shutil.rmtree(work)
        print(_summary(mined, args.num_negatives))
        print(f"wrote {out}; next: hf-e5 validate {out}")


def _pick(args: argparse.Namespace) -> tuple[Source, int]:
    sources, seed = read_mixture(args.data, config=args.dataset_config, max_rows=args.max_rows)
    chosen = [source for source in sources if args.dataset in (None, source.name)]
    if len(chosen) != 1:
        what = "has several datasets" if chosen else f"has no dataset {args.dataset!r}"
        raise InputError(f"{args.data} {what}; choose one with --dataset ({', '.join(s.name for s in sources)})")
    return chosen[0], seed


def _corpus_texts(paths: list[str]) -> Iterator[str]:
    for path in paths:
        documents = load_raw(Source(path=path, name=path), "train")
        if "text" not in documents.column_names:
            raise InputError(f"{path}: no column 'text' (it has {', '.join(documents.column_names)})")
        for batch in documents.select_columns(["text"]).iter(batch_size=1000):
            yield from (text for text in batch["text"] if text and text.strip())


def _write(mined: Dataset, out: Path) -> None:
    with whole_file(out) as file:
        if out.suffix == ".parquet":
            mined.to_parquet(file)
        else:
            file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in mined)


def _summary(mined: Dataset, num_negatives: int) -> str:
    negatives = mined["negative_scores"]
    scores = [score for row in negatives for score in row if score is not None]
    short = sum(len(row) < num_negatives for row in negatives)
    mean = sum(scores) / len(scores) if scores else float("nan")
    return (
        f"{len(mined)} rows, {len(scores)} negatives mined (mean score {mean:.3f}, positives "
        f"{sum(mined['positive_score']) / len(mined):.3f}), {short} rows have fewer than {num_negatives}"
    )
