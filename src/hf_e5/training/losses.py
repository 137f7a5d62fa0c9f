"""InfoNCE over in-batch and hard negatives (paper, section 3.2): value and analytic gradient, without autograd.

The loss of a batch depends on all of its embeddings at once, but its gradient with respect to them has a closed form.
Computing it directly in blocks of queries needs O(chunk_size x N) memory instead of O(B x N), and leaves the encoder a
plain vector-Jacobian product per micro-batch (`training/gradcache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


Mask = Tensor | Callable[[int, int], Tensor]

TEMPERATURE = 0.02  # paper, section 3.2


@dataclass(frozen=True)
class InfoNCEOutput:
    """Value, gradients and statistics of one InfoNCE evaluation; every field is detached.

    `loss` is the mean over the queries. The statistics are scalars (0-d tensors, so that reading them costs a device
    sync only when somebody logs): they describe how well the *unmasked* documents are told apart.
    """

    loss: Tensor  # []
    grad_queries: Tensor  # [B, D], of `loss`
    grad_documents: Tensor  # [N, D], of `loss`
    accuracy: Tensor  # [], share of queries whose positive is the most similar document, in [0, 1]
    mrr: Tensor  # [], mean reciprocal rank of the positive, in (0, 1]
    positive_similarity: Tensor  # [], mean of query x positive
    negative_similarity: Tensor  # [], mean of query x negative over all unmasked pairs
    num_negatives: Tensor  # [], mean number of unmasked negatives of a query


@torch.no_grad()
def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    temperature: float = TEMPERATURE,
    mask: Mask | None = None,
    false_negative_margin: float | None = None,
    chunk_size: int = 512,
) -> InfoNCEOutput:
    """InfoNCE that returns its gradients itself: no autograd runs through it, and `loss.backward()` is an error.

    The loss is `mean_i -log softmax_j(q_i . d_j / temperature)[positives_i]`. To train an encoder with it:

        output = info_nce(queries, documents, positives)
        torch.autograd.backward([queries, documents], [output.grad_queries, output.grad_documents])

    Args:
        queries: [B, D], unit norm for cosine similarity. Half precision is computed in fp32.
        documents: [N, D], positives and negatives of every query together.
        positives: [B] int64, the column of each query's positive, in [0, N).
        temperature: > 0.
        mask: which documents a query must *not* see: bool, [B, N] or [1, N], or a function of the query range
            `(start, stop)` that returns those rows, so that a large mask never exists at once. The positive of a
            query always stays.
        false_negative_margin: leave out documents more similar to the query than its positive by more than this
            margin (cosine, e.g. 0.1). They are likely relevant themselves. The choice itself carries no gradient.
        chunk_size: queries per block; memory is O(chunk_size x N).

    Raises:
        ValueError: if the shapes do not belong together or the temperature is not positive.
    """
    if queries.dim() != 2 or documents.dim() != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"expected [B, D] and [N, D], got {tuple(queries.shape)} and {tuple(documents.shape)}")
    if positives.shape != queries.shape[:1]:
        raise ValueError(f"expected one positive per query, got {tuple(positives.shape)} for {len(queries)} queries")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    compute_dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, documents = queries.to(compute_dtype), documents.to(compute_dtype)
    num_queries, num_documents = len(queries), len(documents)

    grad_queries = torch.empty_like(queries)
    grad_documents = torch.zeros_like(documents)
    sums = queries.new_zeros(6)
    # One buffer per role serves all blocks: on a CPU fresh pages cost as much as the products themselves.
    buffers = queries.new_empty(2, min(chunk_size, num_queries), num_documents)
    for start in range(0, num_queries, chunk_size):
        stop = min(start + chunk_size, num_queries)
        query, positive = queries[start:stop], positives[start:stop, None]
        similarity = torch.mm(query, documents.T, out=buffers[0, : stop - start])  # [c, N]
        positive_similarity = similarity.gather(1, positive)  # [c, 1]

        hidden = _hidden(mask, start, stop)
        if false_negative_margin is not None:
            too_close = similarity > positive_similarity + false_negative_margin
            hidden = too_close if hidden is None else hidden | too_close
        if hidden is not None:
            hidden = hidden.expand_as(similarity).scatter(1, positive, False)
            visible_sum = similarity.sum() - torch.where(hidden, similarity, 0).sum()
            num_visible = (hidden.numel() - hidden.sum()).to(compute_dtype)
            similarity.masked_fill_(hidden, -torch.inf)
        else:
            visible_sum = similarity.sum()
            num_visible = sums.new_tensor(similarity.numel())
        rank = (similarity > positive_similarity).sum(dim=1) + 1  # [c]

        # softmax(similarity / temperature), kept as exp(x - max) / sum to reuse the buffer
        highest = similarity.amax(dim=1, keepdim=True)
        weights = torch.sub(similarity, highest, out=buffers[1, : stop - start]).div_(temperature).exp_()
        total = weights.sum(dim=1, keepdim=True)  # [c, 1]
        losses = total.log() + (highest - positive_similarity) / temperature
        weights.div_(total * (num_queries * temperature))
        weights.scatter_add_(1, positive, weights.new_full(positive.shape, -1 / (num_queries * temperature)))

        torch.mm(weights, documents, out=grad_queries[start:stop])
        grad_documents.addmm_(weights.T, query)
        sums += torch.stack(
            [
                losses.sum(),
                (rank == 1).sum(),
                rank.reciprocal().sum(),
                positive_similarity.sum(),
                visible_sum - positive_similarity.sum(),
                num_visible - len(rank),
            ]
        )
    means = sums / num_queries
    return InfoNCEOutput(
        loss=means[0],
        grad_queries=grad_queries,
        grad_documents=grad_documents,
        accuracy=means[1],
        mrr=means[2],
        positive_similarity=means[3],
        negative_similarity=sums[4] / sums[5].clamp(min=1),
        num_negatives=means[5],
    )


def matryoshka_info_nce(
    queries: Tensor, documents: Tensor, positives: Tensor, *, dims: Sequence[int], **kwargs
) -> InfoNCEOutput:
    """Return the mean of `info_nce` over the leading `dims` of the embeddings, cut and re-normalised (2205.13147).

    The statistics are those of the largest dimension. Takes the arguments of `info_nce` besides.

    Raises:
        ValueError: if a dimension is not in [1, D].
    """
    if not dims or min(dims) < 1 or max(dims) > queries.shape[1]:
        raise ValueError(f"matryoshka dims must lie in 1..{queries.shape[1]}, got {list(dims)}")
    grad_queries, grad_documents = torch.zeros_like(queries), torch.zeros_like(documents)
    loss = queries.new_zeros(())
    for dim in sorted(dims):
        (query, to_queries), (document, to_documents) = _cut(queries, dim), _cut(documents, dim)
        output = info_nce(query, document, positives, **kwargs)
        loss += output.loss / len(dims)
        grad_queries[:, :dim] += to_queries(output.grad_queries) / len(dims)
        grad_documents[:, :dim] += to_documents(output.grad_documents) / len(dims)
    return InfoNCEOutput(
        **{**vars(output), "loss": loss, "grad_queries": grad_queries, "grad_documents": grad_documents}
    )


def _hidden(mask: Mask | None, start: int, stop: int) -> Tensor | None:
    if mask is None or callable(mask):
        return mask and mask(start, stop)
    return mask if len(mask) == 1 else mask[start:stop]


def _cut(embeddings: Tensor, dim: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The first `dim` components at unit norm, and the map of a gradient on them back to the uncut embedding."""
    cut = embeddings[:, :dim]
    norm = cut.norm(dim=1, keepdim=True).clamp(min=1e-12)
    unit = cut / norm
    return unit, lambda grad: (grad - (grad * unit).sum(dim=1, keepdim=True) * unit) / norm
