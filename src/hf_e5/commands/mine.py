"""`hf-e5 mine`: give the rows of a dataset hard negatives."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..data.mining.mine import mine_hard_negatives
from ..data.mining.selection import Selection
from ..data.mixture import load_raw
from ..data.mixture_config import Source, read_mixture
from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="data file (jsonl, parquet), folder, Hub id, or mixture YAML with --dataset")
    parser.add_argument("out", help="file to write: .jsonl or .parquet")
    parser.add_argument("--dataset", help="which dataset of a mixture to mine")
    parser.add_argument("--config", help="configuration of a single folder or Hub id")
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

    group = parser.add_argument_group("selection")
    group.add_argument("--num_negatives", type=int, default=1, help="negatives per row (%(default)s)")
    group.add_argument("--range_min", type=int, default=0, help="skip the first ranks (%(default)s)")
    group.add_argument("--range_max", type=int, default=100, help="last rank to choose from (%(default)s)")
    group.add_argument("--absolute_margin", type=float, help="negatives score this much below the positive")
    group.add_argument("--relative_margin", type=float, help="0.05: negatives score at most 95 %% of the positive")
    group.add_argument("--max_score", type=float, help="negatives score at most this")
    group.add_argument("--sampling", choices=("random", "top"), default="random", help="default: %(default)s")
    group.add_argument("--replace", action="store_true", help="drop the negatives that rows already have")
    group.add_argument("--seed", type=int, default=42, help="of random sampling (%(default)s)")


def run(args: argparse.Namespace) -> int:
    names = Selection.__dataclass_fields__
    selection = Selection(**{name: getattr(args, name) for name in names})
    source, seed = _pick(args)

    from sentence_transformers import SentenceTransformer

    try:
        miner = SentenceTransformer(args.miner)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the miner {args.miner}: {str(error).splitlines()[0]}") from error
    if args.max_length is not None:
        miner.max_seq_length = args.max_length
    report = mine_hard_negatives(
        source,
        miner,
        args.out,
        selection=selection,
        split=args.split,
        sampling_seed=seed,
        corpus=_corpus_texts(args.corpus),
        query_prompt=args.query_prompt,
        document_prompt=args.document_prompt,
        use_instructions=args.use_instructions,
        batch_size=args.batch_size,
        work_dir=args.work_dir,
    )
    if report.rows:  # the main process
        print(
            f"{report.rows} rows, {report.mined} negatives mined (mean score {report.negative_score:.3f}, positives "
            f"{report.positive_score:.3f}), {report.short} rows have fewer than {args.num_negatives}\n"
            f"wrote {args.out}; next: hf-e5 validate {args.out}"
        )
    return 0


def _pick(args: argparse.Namespace) -> tuple[Source, int]:
    sources, seed = read_mixture(args.data, config=args.config, max_rows=args.max_rows)
    if args.dataset is not None:
        sources = [source for source in sources if source.name == args.dataset]
        if not sources:
            raise InputError(f"{args.data} has no dataset {args.dataset!r}")
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise InputError(f"{args.data} has several datasets; choose one with --dataset ({names})")
    return sources[0], seed


def _corpus_texts(paths: list[str]) -> Iterator[str]:
    for path in paths:
        documents = load_raw(Source(path=path, name=path), "train")
        if "text" not in documents.column_names:
            raise InputError(f"{path}: no column 'text' (it has {', '.join(documents.column_names)})")
        for batch in documents.select_columns(["text"]).iter(batch_size=1000):
            yield from (text for text in batch["text"] if text and text.strip())
