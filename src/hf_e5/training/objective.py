"""The objective of one step: from the embeddings of all its texts to the loss and its gradient on each of them.

Local queries are compared with the documents of all processes. Embeddings travel once in each direction: one gather of
documents before `info_nce`, one reduction of the document gradients after it; no autograd runs through either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from .losses import InfoNCEOutput, Mask, info_nce, matryoshka_info_nce


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss of one step and its gradient on the embeddings, all detached."""

    loss: Tensor  # [], mean over the queries of this process
    grad: Tensor  # [U, D], of `loss`, fp32
    statistics: dict[str, Tensor]  # 0-d: accuracy, mrr, positive_similarity, ...


@dataclass(frozen=True, kw_only=True)
class ContrastiveObjective:
    """InfoNCE between the queries of a batch and the documents of all processes.

    Averaging the parameter gradients over the processes, as DDP and DeepSpeed do, yields the gradient of the mean over
    all queries of the step: W processes with B rows each give the gradient of one process with W x B rows. For that,
    each process weighs its mean by its share of the rows (1 unless the last batch is uneven).

    `mask_duplicates`: the documents of a step form a set; a text that several rows hold counts once, and is a negative
    for no query that has it as its positive in some row. Without it every occurrence counts, as in the plain loss.
    The other fields are those of [`~hf_e5.E5TrainingArguments`].
    """

    temperature: float
    gather_across_devices: bool
    mask_duplicates: bool
    false_negative_margin: float | None = None
    matryoshka_dims: Sequence[int] | None = None

    @torch.no_grad()
    def __call__(self, embeddings: Tensor, batch: dict[str, Tensor]) -> ObjectiveOutput:
        """Evaluate a batch of [`~hf_e5.E5DataCollator`] whose U texts have the `embeddings` [U, D]."""
        rows, hashes = batch["queries"], batch["text_hashes"]
        document_index = torch.cat([batch["positives"], batch["negatives"]])  # [n] into the U texts
        positives = torch.arange(len(rows), device=rows.device)  # [B] into the documents
        if self.mask_duplicates:
            document_index, inverse = document_index.unique(return_inverse=True)
            positives = inverse[: len(rows)]
        queries, local_documents = embeddings[rows], embeddings[document_index]

        gathered = _gather(
            local_documents, hashes[document_index], hashes[rows], positives, across=self.gather_across_devices
        )
        positives = gathered.positives
        mask: Mask | None = None
        if self.mask_duplicates:
            positives, mask = gathered.mask_duplicates(hashes[rows])
        elif not gathered.valid_documents.all():
            mask = ~gathered.valid_documents[None]

        loss_function: Callable[..., InfoNCEOutput] = info_nce
        if self.matryoshka_dims:
            loss_function = partial(matryoshka_info_nce, dims=self.matryoshka_dims)
        output = loss_function(
            queries,
            gathered.documents,
            positives,
            temperature=self.temperature,
            mask=mask,
            false_negative_margin=self.false_negative_margin,
        )
        grad = torch.zeros_like(embeddings, dtype=output.grad_queries.dtype)
        grad.index_add_(0, rows, output.grad_queries * gathered.weight)
        grad.index_add_(0, document_index, gathered.return_gradients(output.grad_documents * gathered.weight))
        hard_negatives = (queries[batch["negative_rows"]] * embeddings[batch["negatives"]]).sum(dim=1)
        statistics = {
            "accuracy": output.accuracy,
            "mrr": output.mrr,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
            "hard_negative_similarity": hard_negatives.mean(),  # nan in a step without hard negatives
            "num_negatives": output.num_negatives,
        }
        return ObjectiveOutput(output.loss * gathered.weight, grad, statistics)


@dataclass(frozen=True)
class _Gathered:
    """The documents of all processes, each process padded to the largest count, and where the local ones are.

    With N documents (padding included) and Q queries of all processes, and B queries of this one.
    """

    documents: Tensor  # [N, D]
    document_hashes: Tensor  # [N]
    valid_documents: Tensor  # [N] bool, False for padding
    query_hashes: Tensor  # [Q], of all processes
    query_positives: Tensor  # [Q] into the N documents
    valid_queries: Tensor  # [Q] bool
    positives: Tensor  # [B] into the N documents
    num_local: int  # documents of this process
    world_size: int
    weight: float  # of this process's mean in the mean over all rows, times the world size

    def return_gradients(self, grad_documents: Tensor) -> Tensor:
        """Sum the gradients [N, D] over the processes; return those of the local documents, [num_local, D]."""
        if self.world_size > 1:
            mine = grad_documents.new_empty(len(grad_documents) // self.world_size, grad_documents.shape[1])
            dist.reduce_scatter_tensor(mine, grad_documents)
            grad_documents = mine
        return grad_documents[: self.num_local]

    def mask_duplicates(self, local_query_hashes: Tensor) -> tuple[Tensor, Callable[[int, int], Tensor]]:
        """Return the positives [B] as columns of the distinct documents, and the mask of what is no negative.

        Documents a b a c, query 0 with the positives a (column 0) and c (column 3), query 1 with a (column 2):
            column 2 repeats column 0 and is hidden from both; query 1's positive becomes column 0;
            query 0 must not see its positives 0 and 3 (`info_nce` shows it the one of the row), query 1 not 0.
        """
        size = len(self.document_hashes)
        columns = torch.arange(size, device=self.document_hashes.device)
        _, group = self.document_hashes.unique(return_inverse=True)
        # The first valid occurrence of a text stands for all; padding comes after every real document.
        rank = torch.where(self.valid_documents, columns, columns + size)
        first = rank.new_full((size,), 2 * size).scatter_reduce(0, group, rank, "amin")[group]
        hidden_columns = (first != columns)[None]  # [1, N]
        query_positives = first[torch.where(self.valid_queries, self.query_positives, 0)]

        def mask(start: int, stop: int) -> Tensor:
            same_query = local_query_hashes[start:stop, None] == self.query_hashes[None]  # [c, Q]
            same_query &= self.valid_queries
            also_positive = torch.zeros(len(same_query), size, device=columns.device)
            also_positive.scatter_add_(1, query_positives.expand_as(same_query), same_query.float())
            return hidden_columns | (also_positive > 0)

        return first[self.positives], mask


def _gather(
    documents: Tensor, document_hashes: Tensor, query_hashes: Tensor, positives: Tensor, *, across: bool
) -> _Gathered:
    world_size, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        world_size, rank = dist.get_world_size(), dist.get_rank()
    counts = [[len(documents), len(positives)]]
    if world_size > 1:
        counts = _all_gather(torch.tensor(counts, device=documents.device), world_size).tolist()
    weight = len(positives) * world_size / sum(num_rows for _, num_rows in counts)
    if not across:
        world_size, rank, counts = 1, 0, [counts[rank]]
    most_documents, most_rows = (max(column) for column in zip(*counts, strict=True))
    device = documents.device
    positives = positives + rank * most_documents
    # Hashes and positions share one int64 gather; embeddings need one of their own.
    integers = torch.cat(
        [_pad(document_hashes, most_documents), _pad(query_hashes, most_rows), _pad(positives, most_rows)]
    )
    integers = _all_gather(integers[None], world_size)  # [W, documents + 2 x rows]
    all_document_hashes, all_query_hashes, all_positives = integers.split([most_documents, most_rows, most_rows], 1)
    num_documents, num_rows = torch.tensor(counts, device=device).T[:, :, None]
    return _Gathered(
        documents=_all_gather(_pad(documents, most_documents), world_size),
        document_hashes=all_document_hashes.flatten(),
        valid_documents=(torch.arange(most_documents, device=device) < num_documents).flatten(),
        query_hashes=all_query_hashes.flatten(),
        query_positives=all_positives.flatten(),
        valid_queries=(torch.arange(most_rows, device=device) < num_rows).flatten(),
        positives=positives,
        num_local=len(documents),
        world_size=world_size,
        weight=weight,
    )


def _all_gather(tensor: Tensor, world_size: int) -> Tensor:
    """Concatenate the equally shaped tensors of all processes along the first dimension."""
    if world_size == 1:
        return tensor
    gathered = tensor.new_empty(world_size * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def _pad(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
