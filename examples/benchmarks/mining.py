"""Measure hard-negative mining: the search stage on random unit vectors, beside faiss, and the encoder on real text.

python examples/benchmarks/mining.py search --queries 100000 --documents 100000
python examples/benchmarks/mining.py search --queries 16384 --documents 100000 --faiss
python examples/benchmarks/mining.py encode --miner MODEL --texts 2000
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from hf_e5.data.mining import mine as mining
from hf_e5.data.mining.text_blocks import BLOCK


def write_vectors(folder: Path, count: int, dim: int, seed: int) -> None:
    """Random unit vectors in the files that `hf-e5 mine` writes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for number, start in enumerate(range(0, count, BLOCK)):
        block = torch.randn(min(BLOCK, count - start), dim, generator=generator)
        np.save(folder / f"{number:06d}.npy", torch.nn.functional.normalize(block, dim=1).numpy())


def search(args: argparse.Namespace) -> None:
    state = PartialState(cpu=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_vectors(work / "query_vectors", args.queries, args.dim, 0)
        write_vectors(work / "document_vectors", args.documents, args.dim, 1)
        own = np.arange(args.queries)  # every query has one known positive
        np.savez(work / "rows.npz", excluded_queries=own, excluded_documents=own % args.documents)
        start = time.perf_counter()
        mining._search(work, args.top_k, torch.device("cpu"), state)
        ours = time.perf_counter() - start
        products = args.queries * args.documents
        print(
            f"{args.queries} x {args.documents}, dim {args.dim}, top {args.top_k}, {torch.get_num_threads()} threads"
        )
        print(f"hf-e5 search: {ours:.1f} s, {products / ours / 1e6:.0f} million pairs/s, peak memory {peak():.1f} GB")
        if args.faiss:
            compare_with_faiss(work, args, ours)


def compare_with_faiss(work: Path, args: argparse.Namespace, ours: float) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, documents = (
        np.concatenate([np.load(file) for file in sorted((work / f"{kind}_vectors").glob("*.npy"))])
        for kind in ("query", "document")
    )
    index = faiss.IndexFlatIP(args.dim)
    index.add(documents)
    start = time.perf_counter()
    _, ids = index.search(queries, args.top_k + 1)  # one more, as it cannot leave the positive out
    theirs = time.perf_counter() - start
    mine = np.concatenate([np.load(file)["ids"] for file in sorted((work / f"ranking_{args.top_k}").glob("*.npz"))])
    found = 0
    for row in range(args.queries):
        expected = ids[row][ids[row] != row % args.documents][: args.top_k]
        found += len(np.intersect1d(mine[row], expected))
    print(f"faiss IndexFlatIP: {theirs:.1f} s; faiss / hf-e5 = {theirs / ours:.2f}")
    print(f"recall of hf-e5 against faiss: {found / mine.size:.6f}")


def encode(args: argparse.Namespace) -> None:
    from sentence_transformers import SentenceTransformer

    sample = Path(__file__).parent.parent / "data/triplets.jsonl"
    texts = [json.loads(line)["positive"] for line in sample.open(encoding="utf-8")][: args.texts]
    model = SentenceTransformer(args.miner, device="cpu")
    start = time.perf_counter()
    model.encode(texts, batch_size=64)
    seconds = time.perf_counter() - start
    characters = sum(map(len, texts)) / len(texts)
    print(f"{len(texts)} texts of {characters:.0f} characters: {seconds:.1f} s, {len(texts) / seconds:.0f} texts/s")


def peak() -> float:
    """Peak resident memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("search")
    command.add_argument("--queries", type=int, default=100_000)
    command.add_argument("--documents", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=384)
    command.add_argument("--top_k", type=int, default=100)
    command.add_argument("--faiss", action="store_true", help="also search with faiss (pip install faiss-cpu)")
    command.set_defaults(run=search)
    command = commands.add_parser("encode")
    command.add_argument("--miner", required=True)
    command.add_argument("--texts", type=int, default=2000)
    command.set_defaults(run=encode)
    args = parser.parse_args()
    args.run(args)
