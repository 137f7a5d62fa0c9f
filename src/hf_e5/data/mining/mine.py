"""Hard negatives: documents that a miner model ranks high for a query and that are none of its positives.

The paper takes one of the top 100 of multilingual-e5-base (appendix A). Margins as in NV-Retriever (arXiv 2407.15831)
keep documents away that score like positives because they are positives nobody labelled.

1. *Prepare*: number the distinct queries and documents; note for each query which documents it must never get.
2. *Encode* them, one file of `BLOCK` vectors at a time.
3. *Search* exactly, one file of `BLOCK` queries at a time.
4. *Choose* negatives from the ranking of each row and write the rows out.

The files of 2 and 3 make mining resumable, bound its memory and are the units that several processes share.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ...errors import InputError
from ...files import whole_file
from ...instructions import format_query
from ...records import text_key
from ..mixture import Row, open_source, read_rows, row_instruction
from ..mixture_config import DEFAULT_SEED, Source
from .search import exact_search
from .selection import Selection
from .text_blocks import BLOCK, TextReader, TextWriter


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class MiningReport:
    """What mining wrote: rows, how many miss negatives, and mean scores of positives and mined negatives."""

    rows: int = 0
    mined: int = 0
    short: int = 0
    positive_score: float = 0.0
    negative_score: float = 0.0


def mine_hard_negatives(
    source: Source,
    miner: SentenceTransformer,
    out: str | Path,
    *,
    selection: Selection,
    split: str = "train",
    sampling_seed: int = DEFAULT_SEED,
    corpus: Iterable[str] = (),
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    use_instructions: bool = False,
    batch_size: int = 64,
    work_dir: str | Path | None = None,
) -> MiningReport:
    """Give every row of a dataset hard negatives and write the rows to `out`.

    Candidates are the distinct positives and negatives of all rows, and the texts of `corpus`. A row never gets a
    positive of any row with the same query, nor the query itself; texts are compared without case and spacing.

    Call it in one process or in several (`accelerate launch`); several share the work and need a common file system.

    Args:
        source: the dataset, see `mixture_config.read_mixture`.
        miner: any SentenceTransformer.
        out: a `.jsonl` or `.parquet` file with `instruction`, `query`, `positive` (a list where a row has several),
            `negative`, `negative_scores` (null for negatives that the row had) and `task_type`.
        selection: which of the ranked documents to take.
        split: of the dataset, where it does not name one.
        sampling_seed: of the mixture, for a source with `ratio` or `max_rows`.
        corpus: further documents.
        query_prompt, document_prompt: prefix of the texts. By default the miner's own `query` and `document` prompts.
        use_instructions: give each query its row's instruction as prefix (`Instruct: ...`), for instruction models.
        batch_size: of the encoder.
        work_dir: keeps embeddings and rankings. By default beside `out`, and removed at the end.

    Raises:
        InputError: wrong `out`, a row without query or positive, or a `work_dir` of other data or another miner.
    """
    out = Path(out)
    if out.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{out}: name a .jsonl or .parquet file to write")
    work = Path(work_dir) if work_dir is not None else out.with_name(out.name + ".work")
    dataset, rows = open_source(source, split=split, seed=sampling_seed)
    work.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=miner.device.type == "cpu")
    settings = {
        "miner": miner.encode("probe")[:8].round(2).tolist(),  # a local folder has no name to tell models apart
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "use_instructions": use_instructions,
        "max_length": miner.max_seq_length,
    }
    problem: list[InputError | None] = [None]
    if state.is_main_process:
        try:
            _prepare(dataset, rows, source, corpus, use_instructions, work, settings)
        except InputError as error:
            problem[0] = error
    if state.num_processes > 1:  # every process must leave, or the others would wait forever
        torch.distributed.broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]

    _encode(miner, work, "query", "" if use_instructions else query_prompt, batch_size, state)
    _encode(miner, work, "document", document_prompt, batch_size, state)
    state.wait_for_everyone()
    _search(work, selection.range_max, miner.device, state)
    state.wait_for_everyone()
    report = MiningReport()
    if state.is_main_process:
        report = _write(dataset, rows, source, work, out, selection)
        if work_dir is None:
            shutil.rmtree(work)
    state.wait_for_everyone()
    return report


def _prepare(
    dataset: Dataset,
    rows: np.ndarray,
    source: Source,
    corpus: Iterable[str],
    use_instructions: bool,
    work: Path,
    settings: dict[str, Any],
) -> None:
    """Number queries and documents, and write down what belongs to which row.

    `rows.npz` holds: `query_of_row` [R]; `positives` and `negatives` (document numbers) of row i from
    `positive_starts[i]` to `positive_starts[i + 1]`; and the pairs that no search may return, sorted by query:
    `excluded_queries`, `excluded_documents` [E].
    """
    query_of_row, group_of_query = array("q"), array("q")  # a group: the same query, whatever its instruction
    positives, negatives, positive_starts, negative_starts = array("q"), array("q"), array("q", [0]), array("q", [0])
    groups: dict[int, int] = {}
    pairs_group, pairs_document = array("q"), array("q")
    with TextWriter.open(work / "query.arrow") as queries, TextWriter.open(work / "document.arrow") as documents:
        for number, row in _read(dataset, rows, source, "Reading"):
            if problem := row.error():
                raise InputError(f"dataset {source.name!r}, row {number}, field {problem[0]!r}: {problem[1]}")
            text = format_query(row.query, row_instruction(source, row, number)) if use_instructions else row.query
            query = queries.add(text, text)
            query_of_row.append(query)
            group = groups.setdefault(text_key(row.query), len(groups))
            if query == len(group_of_query):
                group_of_query.append(group)
            positives.extend([documents.add(text_key(text), text) for text in row.positives])
            negatives.extend([documents.add(text_key(text), text) for text in row.negatives])
            positive_starts.append(len(positives))
            negative_starts.append(len(negatives))
            new = positives[positive_starts[-2] :]
            pairs_group.extend([group] * len(new))
            pairs_document.extend(new)
        for text in corpus:
            documents.add(text_key(text), text)
    for key, group in groups.items():  # a query is no negative of itself
        if key in documents.numbers:
            pairs_group.append(group)
            pairs_document.append(documents.numbers[key])
    settings |= {"queries": queries.digest(), "documents": documents.digest()}

    pairs = np.unique(np.stack([np.array(pairs_group), np.array(pairs_document)]), axis=1)
    group_of = np.array(group_of_query)
    starts, ends = np.searchsorted(pairs[0], group_of, "left"), np.searchsorted(pairs[0], group_of, "right")
    arrays: dict[str, Any] = {
        "query_of_row": np.array(query_of_row),
        "positives": np.array(positives),
        "positive_starts": np.array(positive_starts),
        "negatives": np.array(negatives, dtype=np.int64),
        "negative_starts": np.array(negative_starts),
        "excluded_queries": np.repeat(np.arange(len(group_of)), ends - starts),
        "excluded_documents": np.concatenate([pairs[1, s:e] for s, e in zip(starts, ends, strict=True)]),
    }
    settings_file = work / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise InputError(
            f"{work} holds the work of other data, another miner or other prompts: remove it or name another"
        )
    np.savez(work / "rows.npz", **arrays)
    settings_file.write_text(json.dumps(settings))


def _encode(
    miner: SentenceTransformer, work: Path, kind: str, prompt: str | None, batch_size: int, state: PartialState
) -> None:
    """Write the unit vectors (float32) of this process's share of the blocks that are not there yet."""
    texts = TextReader(work / f"{kind}.arrow")
    folder = work / f"{kind}_vectors"
    folder.mkdir(exist_ok=True)
    encode: Any = miner.encode_query if kind == "query" else miner.encode_document
    options: dict[str, Any] = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
    if prompt is not None:
        encode, options["prompt"] = miner.encode, prompt
    blocks = range(state.process_index, texts.num_blocks, state.num_processes)
    doing = "Encoding queries" if kind == "query" else "Encoding documents"
    for block in tqdm(blocks, desc=doing, unit=" blocks", disable=not state.is_main_process):
        path = folder / f"{block:06d}.npy"
        if not path.exists():
            vectors = encode(texts.block(block), **options)
            with whole_file(path) as file:
                np.save(file, vectors)


def _search(work: Path, top_k: int, device: torch.device, state: PartialState) -> None:
    """Rank the documents for this process's share of the blocks of queries that are not ranked yet."""
    query_files = sorted((work / "query_vectors").glob("*.npy"))
    document_files = sorted((work / "document_vectors").glob("*.npy"))
    folder = _ranking_folder(work, top_k)
    folder.mkdir(exist_ok=True)
    with np.load(work / "rows.npz") as saved:
        excluded_queries, excluded_documents = saved["excluded_queries"], saved["excluded_documents"]
    share = query_files[state.process_index :: state.num_processes]
    for query_file in tqdm(share, desc="Searching", unit=" blocks", disable=not state.is_main_process):
        path = folder / query_file.with_suffix(".npz").name
        if path.exists():
            continue
        first = int(query_file.stem) * BLOCK
        low, high = np.searchsorted(excluded_queries, [first, first + BLOCK])
        scores, ids, excluded_scores = exact_search(
            torch.from_numpy(np.load(query_file)).to(device),
            ((i * BLOCK, torch.from_numpy(np.load(file))) for i, file in enumerate(document_files)),
            top_k,
            excluded_rows=torch.from_numpy(excluded_queries[low:high] - first).to(device),
            excluded_ids=torch.from_numpy(excluded_documents[low:high]).to(device),
        )
        ranking = {"scores": scores, "ids": ids, "excluded_scores": excluded_scores}
        arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in ranking.items()}
        with whole_file(path) as file:
            np.savez(file, **arrays)


def _write(
    dataset: Dataset, rows: np.ndarray, source: Source, work: Path, out: Path, selection: Selection
) -> MiningReport:
    """Choose the negatives of every row and write the rows to `out`, whole or not at all."""
    arrays = dict(np.load(work / "rows.npz"))
    documents = TextReader(work / "document.arrow")
    several = bool((np.diff(arrays["positive_starts"]) > 1).any())

    @lru_cache(maxsize=8)
    def ranking(block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        with np.load(_ranking_folder(work, selection.range_max) / f"{block:06d}.npz") as file:
            first_pair = int(np.searchsorted(arrays["excluded_queries"], block * BLOCK))
            return file["scores"], file["ids"], file["excluded_scores"], first_pair

    report, positive_scores, negative_scores = MiningReport(), [], []

    def mined() -> Iterable[dict[str, Any]]:
        for i, (number, row) in enumerate(_read(dataset, rows, source, "Writing")):
            query = int(arrays["query_of_row"][i])
            scores, ids, excluded_scores, first_pair = ranking(query // BLOCK)
            low, high = np.searchsorted(arrays["excluded_queries"], [query, query + 1])
            own = slice(arrays["positive_starts"][i], arrays["positive_starts"][i + 1])
            is_own = np.isin(arrays["excluded_documents"][low:high], arrays["positives"][own])
            positive_score = float(excluded_scores[low - first_pair : high - first_pair][is_own].min())
            negatives = [] if selection.replace else list(row.negatives)
            taken = arrays["negatives"][arrays["negative_starts"][i] : arrays["negative_starts"][i + 1]]
            chosen = selection.choose(
                scores[query % BLOCK], ids[query % BLOCK], positive_score, set(taken.tolist()), len(negatives), number
            )
            new_scores = [float(scores[query % BLOCK, position]) for position in chosen]
            report.rows += 1
            report.mined += len(chosen)
            report.short += len(negatives) + len(chosen) < selection.num_negatives
            positive_scores.append(positive_score)
            negative_scores.extend(new_scores)
            yield {
                "instruction": row_instruction(source, row, number),
                "query": row.query,
                "positive": row.positives if several else row.positives[0],
                "negative": negatives + [documents.text(int(ids[query % BLOCK, position])) for position in chosen],
                "negative_scores": [None] * len(negatives) + new_scores,
                "task_type": row.task_type,
            }

    with whole_file(out) as file:
        _write_rows(file, mined(), out.suffix, several)
    report.positive_score = float(np.mean(positive_scores))
    report.negative_score = float(np.mean(negative_scores)) if negative_scores else float("nan")
    return report


def _write_rows(file: Any, rows: Iterable[dict[str, Any]], suffix: str, several: bool) -> None:
    if suffix == ".jsonl":
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        return
    text, texts = pa.string(), pa.list_(pa.string())
    schema = pa.schema(
        {
            "instruction": text,
            "query": text,
            "positive": texts if several else text,
            "negative": texts,
            "negative_scores": pa.list_(pa.float32()),
            "task_type": text,
        }
    )
    with pq.ParquetWriter(file, schema) as writer:
        iterator = iter(rows)
        while chunk := list(islice(iterator, 10_000)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def _read(dataset: Dataset, rows: np.ndarray, source: Source, doing: str) -> Iterator[tuple[int, Row]]:
    """Row numbers and rows, with a progress bar; rows without text are skipped where the source says so."""
    with tqdm(total=len(dataset), desc=doing, unit=" rows") as progress:
        for start in range(0, len(dataset), 1000):
            numbers = rows[start : start + 1000].tolist()
            for number, row in zip(numbers, read_rows(dataset[start : start + 1000], source), strict=True):
                problem = row.error()
                if not (problem and problem[1] == "no text" and source.drop_empty):
                    yield number, row
            progress.update(len(numbers))


def _ranking_folder(work: Path, top_k: int) -> Path:
    return work / f"ranking_{top_k}"
