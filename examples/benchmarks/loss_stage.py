"""The loss alone, embeddings to gradients on them: `info_nce` against sentence-transformers' cached loss.

    python examples/benchmarks/loss_stage.py

B queries against B positives and N - B negatives of dimension D. The peer's stage is the part of its cached loss that
runs between its two passes over the encoder, called with the same embeddings in its micro-batches of 32.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from step_common import save_result

from hf_e5.training.losses import info_nce


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 4096, 512), metavar=("B", "N", "D"))
    parser.add_argument("--peer_mini_batch_size", type=int, default=32, help="its default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="write the result as JSON")
    args = parser.parse_args()
    num_queries, num_documents, dim = args.shape
    torch.manual_seed(0)
    queries, documents = (F.normalize(torch.randn(count, dim), dim=1) for count in (num_queries, num_documents))
    positives = torch.arange(num_queries)

    info_nce(queries[:64], documents[:64], positives[:64])
    ours_times, ours = fastest(args.repeats, lambda: info_nce(queries, documents, positives, temperature=0.02))
    peer_times, (loss, grad) = fastest(args.repeats, lambda: peer_stage(queries, documents, args.peer_mini_batch_size))
    # The peer normalises inside its loss: its gradient lies in the sphere's tangent. Our encoder does that projection.
    tangent = ours.grad_queries - (ours.grad_queries * queries).sum(dim=1, keepdim=True) * queries
    error = ((tangent - grad).norm() / grad.norm()).item()
    print(f"{num_queries} queries, {num_documents} documents, dimension {dim}, {torch.get_num_threads()} threads")
    for name, times, value in (("info_nce", ours_times, ours.loss), ("sentence-transformers", peer_times, loss)):
        print(f"{name:22} {times[0]:7.3f} s, {times[1]:7.3f} s of processor time, loss {value:.5f}")
    ratio = [peer / mine for peer, mine in zip(peer_times, ours_times, strict=True)]
    print(f"{ratio[0]:.1f}x faster, {ratio[1]:.1f}x by processor time; gradients differ by {error:.1e}")
    result = {"shape": args.shape, "seconds, processor seconds": {"hf-e5": ours_times, "peer": peer_times}}
    save_result(args.output, {**result, "ratio": ratio, "relative_error": error})


def peer_stage(queries: torch.Tensor, documents: torch.Tensor, size: int) -> tuple[float, torch.Tensor]:
    """`calculate_loss(with_backward=True)` on leaves per micro-batch, as its `forward` prepares them."""
    loss = CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]), 50.0, mini_batch_size=size
    )
    columns = (queries, documents[: len(queries)], documents[len(queries) :])
    leaves = [[part.clone().requires_grad_() for part in column.split(size)] for column in columns if len(column)]
    value = loss.calculate_loss(leaves, with_backward=True)
    return value.item(), torch.cat([leaf.grad for leaf in leaves[0]])


def fastest(repeats: int, function):
    """The least time by the wall's clock and by the processor's of `repeats` calls, and the last call's result."""
    walls, processor = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    return (min(walls), min(processor)), result


if __name__ == "__main__":
    main()
