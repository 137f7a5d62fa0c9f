"""Hard negatives: documents that a miner model ranks high for a query and that are none of its positives.

The paper takes one of the top 100 of multilingual-e5-base (appendix A). Margins as in NV-Retriever (arXiv 2407.15831)
keep documents away that score like positives because they are positives nobody labelled.

1. *Number* the distinct queries and documents; note for each query which documents it must never get.
2. *Encode* them, one file of `BLOCK` vectors at a time.
3. *Search* exactly, one file of `BLOCK` queries at a time.
4. *Choose* negatives from the ranking of each row.

The files of 2 and 3 make mining resumable, bound its memory and are the units that several processes share.
sentence-transformers' `mine_hard_negatives` holds all texts and embeddings in memory, cannot go on after half of the
texts, drops rows for which it finds too few negatives, and knows one prompt for all rows.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ...errors import InputError
from ...files import whole_file
from ...instructions import format_query
from ...records import text_key
from ..mixture import Row, read_rows
from ..mixture_config import Source
from .search import exact_search
from .selection import Selection
from .text_blocks import BLOCK, TextReader, TextWriter


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BY_NAME = Source(path="", name="rows")  # roles go by their own names
_MINED = {
    "negative": List(Value("string")),
    "negative_scores": List(Value("float32")),
    "positive_score": Value("float32"),
}


def mine_hard_negatives(
    dataset: Dataset,
    miner: SentenceTransformer,
    *,
    selection: Selection | None = None,
    corpus: Iterable[str] = (),
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    use_instructions: bool = False,
    batch_size: int = 64,
    work_dir: str | Path | None = None,
) -> Dataset:
    """Give every row of a dataset hard negatives.

    Candidates are the distinct positives and negatives of all rows, and the texts of `corpus`. A row never gets a
    positive of any row with the same query, nor the query itself; texts are compared without case and spacing.

    Call it in one process or in several (`accelerate launch`), which share the work.

    Args:
        dataset: columns `query` and `positive` (a text or a list of texts), optionally `instruction`, `negative` (a
            text, a list of texts or None) and others that hf-e5 writes.
        miner: any SentenceTransformer.
        selection: which of the ranked documents to take; by default the paper's, a random one of the first 100.
        corpus: further documents.
        query_prompt: prefix of the queries; the miner's own `query` prompt by default.
        document_prompt: prefix of the documents; the miner's own `document` prompt by default.
        use_instructions: give each query its row's instruction as prefix (`Instruct: ...`), for instruction models.
        batch_size: of the encoder.
        work_dir: keeps embeddings and rankings, so that a broken call goes on where it was; processes on several
            machines need one that all of them see. By default a temporary folder.

    Returns:
        The rows in their order and with their columns, and with `negative` (list of texts), `negative_scores` (cosine
        similarities; None for negatives that the row had) and `positive_score` (of the row's worst positive).

    Raises:
        InputError: an unknown column, a row without query or positive, or a `work_dir` of other data or another miner.
    """
    selection = selection or Selection()
    state = PartialState(cpu=miner.device.type == "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(broadcast_object_list([work_dir or temporary])[0])
        work.mkdir(parents=True, exist_ok=True)
        settings = {
            "miner": miner.encode("probe")[:8].round(2).tolist(),  # a local folder has no name to tell models apart
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "use_instructions": use_instructions,
            "max_length": miner.max_seq_length,
        }
        outcome: list[Any] = [None]
        if state.is_main_process:
            try:
                outcome = [settings | _number_texts(dataset, corpus, use_instructions, work)]
                _check_settings(work / "settings.json", outcome[0])
            except InputError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], InputError):  # every process must leave, or the others would wait forever
            raise outcome[0]

        _encode(miner, work, "query", "" if use_instructions else query_prompt, batch_size, state)
        _encode(miner, work, "document", document_prompt, batch_size, state)
        state.wait_for_everyone()
        _search(work, selection.range_max, miner.device, state)
        state.wait_for_everyone()
        with state.main_process_first():  # the others read what it cached
            mined = _choose(dataset, work, selection, outcome[0])
        state.wait_for_everyone()  # before the folder goes
    return mined


def _number_texts(dataset: Dataset, corpus: Iterable[str], use_instructions: bool, work: Path) -> dict[str, str]:
    """Number the distinct queries and documents, and write down what belongs to which row.

    `rows.npz` holds: `queries` [R]; `documents` of row i, the positives first, from `starts[i]` to `starts[i + 1]`;
    `num_positives` [R]; and `excluded_queries`, `excluded_documents` [E], see `_excluded_pairs`.

    Returns:
        A digest of the queries and one of the documents.
    """
    query_of_row, own, starts, num_positives = array("q"), array("q"), array("q", [0]), array("q")
    groups: dict[int, int] = {}  # a group: the same query, whatever its instruction
    group_of_query = array("q")
    with TextWriter.open(work / "query.arrow") as queries, TextWriter.open(work / "document.arrow") as documents:
        for row in _checked_rows(dataset):
            text = format_query(row.query, row.instruction) if use_instructions else row.query
            query_of_row.append(queries.add(text, text))
            group = groups.setdefault(text_key(row.query), len(groups))
            if len(queries.numbers) > len(group_of_query):
                group_of_query.append(group)
            own.extend([documents.add(text_key(text), text) for text in (*row.positives, *row.negatives)])
            starts.append(len(own))
            num_positives.append(len(row.positives))
        for text in corpus:
            documents.add(text_key(text), text)
    rows = np.repeat(np.arange(len(query_of_row)), np.diff(starts))
    is_positive = np.arange(len(own)) - np.array(starts)[rows] < np.array(num_positives)[rows]
    groups_of_own = np.array(group_of_query)[query_of_row][rows]
    itself = [(group, documents.numbers[key]) for key, group in groups.items() if key in documents.numbers]
    known = np.concatenate([np.stack([groups_of_own, own], axis=1)[is_positive], np.array(itself, int).reshape(-1, 2)])
    excluded_queries, excluded_documents = _excluded_pairs(np.array(group_of_query), known)
    np.savez(
        work / "rows.npz",
        queries=np.array(query_of_row),
        documents=np.array(own),
        starts=np.array(starts),
        num_positives=np.array(num_positives),
        excluded_queries=excluded_queries,
        excluded_documents=excluded_documents,
    )
    return {"queries": queries.digest(), "documents": documents.digest()}


def _checked_rows(dataset: Dataset) -> Iterator[Row]:
    for start in tqdm(range(0, len(dataset), 1000), desc="Reading", unit=" x 1000 rows"):
        for number, row in enumerate(read_rows(dataset[start : start + 1000], _BY_NAME), start):
            if error := row.error():
                raise InputError(f"row {number}, field {error.role!r}: {error.message}")
            yield row


def _excluded_pairs(group_of_query: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From pairs [K, 2] of group and document to all pairs of query and document that no search may return.

    Returns:
        Query numbers, in rising order, and document numbers, int64 [E] each.
    """
    groups, documents = np.unique(known, axis=0).T
    starts, ends = np.searchsorted(groups, group_of_query, "left"), np.searchsorted(groups, group_of_query, "right")
    queries = np.repeat(np.arange(len(group_of_query)), ends - starts)
    return queries, np.concatenate([documents[start:end] for start, end in zip(starts, ends, strict=True)])


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write down what the files beside `path` depend on, or refuse files that depend on something else."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(
            f"{path.parent} holds the work of other data, another miner or other prompts: remove it or name another"
        )
    path.write_text(json.dumps(settings))


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
    folder = work / f"ranking_{top_k}"
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


def _choose(dataset: Dataset, work: Path, selection: Selection, settings: dict[str, Any]) -> Dataset:
    """Add the chosen negatives and the scores to every row."""
    arrays = dict(np.load(work / "rows.npz"))
    documents = TextReader(work / "document.arrow")

    @lru_cache(maxsize=8)
    def ranking(block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        first_pair = int(np.searchsorted(arrays["excluded_queries"], block * BLOCK))
        with np.load(work / f"ranking_{selection.range_max}" / f"{block:06d}.npz") as file:
            return file["scores"], file["ids"], file["excluded_scores"], first_pair

    def add_negatives(batch: Mapping[str, list], positions: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in _MINED}
        for i, row in zip(positions, read_rows(batch, _BY_NAME), strict=True):
            query = int(arrays["queries"][i])
            all_scores, all_ids, excluded_scores, first_pair = ranking(query // BLOCK)
            scores, ids = all_scores[query % BLOCK], all_ids[query % BLOCK]
            own = arrays["documents"][arrays["starts"][i] : arrays["starts"][i + 1]]
            positives, negatives = np.split(own, [arrays["num_positives"][i]])
            low, high = np.searchsorted(arrays["excluded_queries"], [query, query + 1])
            is_positive = np.isin(arrays["excluded_documents"][low:high], positives)
            positive_score = float(excluded_scores[low - first_pair : high - first_pair][is_positive].min())
            kept = [] if selection.replace else row.negatives
            chosen = selection.choose(scores, ids, positive_score, set(negatives.tolist()), len(kept), i)
            columns["negative"].append(kept + [documents.text(int(ids[position])) for position in chosen])
            columns["negative_scores"].append([None] * len(kept) + scores[chosen].tolist())
            columns["positive_score"].append(positive_score)
        return columns

    return dataset.map(
        add_negatives,
        batched=True,
        with_indices=True,
        features=Features({**dataset.features, **_MINED}),
        new_fingerprint=Hasher.hash((dataset._fingerprint, settings, selection)),  # `work` cannot be hashed
        desc="Choosing negatives",
    )
