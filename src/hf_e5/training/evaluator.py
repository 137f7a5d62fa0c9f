"""Evaluation during training: how well queries find their documents in the corpus of the evaluation set."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..metrics.ranking import MRR, NDCG, Accuracy
from ..modeling.encoder import E5Model
from ..modeling.packed.micro_batches import forward_batches
from .losses import info_nce


# Documents kept per query: enough for MRR to be that of the full ranking but for a tail below 1 / RANKED.
RANKED = 100


@torch.no_grad()
def evaluate_retrieval(
    model: nn.Module,
    dataset: Any,
    accelerator: Accelerator,
    *,
    batch_size: int,
    temperature: float,
    show_progress: bool,
) -> dict[str, float]:
    """Embed a tokenised set and rank its corpus for each of its queries.

    The corpus is every distinct positive and negative of the set, so that the figures depend neither on the batch size
    nor on the number of processes. All processes embed a share and return the same figures.

    Args:
        model: The model as prepared by the accelerator, or bare.
        dataset: Rows of `hf_e5.data.tokenization.tokenize_dataset`.
        batch_size: Texts of one forward pass and process.
        temperature: Of the loss.

    Returns:
        `loss` (InfoNCE against the whole corpus: comparable only between sets of one size), `accuracy`, `mrr`,
        `ndcg_at_10`, and the mean cosine similarities `positive_similarity` and `negative_similarity`.
    """
    texts: dict[tuple[int, ...], int] = {}

    def index(ids: list[int]) -> int:
        return texts.setdefault(tuple(ids), len(texts))

    queries: list[int] = []
    positives: list[int] = []
    negatives: list[int] = []
    for row in dataset:
        queries.append(index(row["query_ids"]))
        positives.append(index(row["positive_ids"]))
        negatives.extend(index(ids) for ids in row["negative_ids"])
    embeddings = _embed(model, list(texts), accelerator, batch_size, show_progress)
    corpus = sorted({*positives, *negatives})
    place = {text: column for column, text in enumerate(corpus)}
    # The same query may stand in several rows, each with a positive of its own: all of them are relevant.
    relevant: dict[int, set[int]] = {}
    for query, positive in zip(queries, positives, strict=True):
        relevant.setdefault(query, set()).add(place[positive])

    query_vectors, document_vectors = embeddings[torch.tensor(queries)], embeddings[torch.tensor(corpus)]
    targets = torch.tensor([place[positive] for positive in positives])

    def other_positives(start: int, stop: int) -> Tensor:
        mask = torch.zeros(stop - start, len(corpus), dtype=torch.bool)
        for row in range(start, stop):
            mask[row - start, list(relevant[queries[row]])] = True
        return mask  # info_nce never hides a query's own positive

    output = info_nce(query_vectors, document_vectors, targets, temperature=temperature, mask=other_positives)
    ranked: list[list[int]] = []
    for start in range(0, len(queries), 512):
        scores = query_vectors[start : start + 512] @ document_vectors.T
        ranked.extend(scores.topk(min(RANKED, len(corpus)), dim=1).indices.tolist())
    metrics = {
        "loss": output.loss.item(),
        "positive_similarity": output.positive_similarity.item(),
        "negative_similarity": output.negative_similarity.item(),
    }
    references = [sorted(relevant[query]) for query in queries]
    for metric in (Accuracy(), MRR(), NDCG()):
        metrics.update(metric.compute(predictions=ranked, references=references))
    return metrics


def _embed(
    model: nn.Module, texts: list[tuple[int, ...]], accelerator: Accelerator, batch_size: int, show_progress: bool
) -> Tensor:
    """Embed `texts` over all processes; [len(texts), dim] fp32 on the CPU of every process.

    Every process runs the same number of forward passes, as ZeRO-3 and FSDP require; short of texts, it repeats one.
    """
    bare: E5Model = accelerator.unwrap_model(model)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # longest first: an OOM shows at once
    step = batch_size * accelerator.num_processes
    vectors: Tensor | None = None
    with bare.evaluating():
        for start in tqdm(range(0, len(order), step), desc="evaluate", disable=not show_progress, leave=False):
            # Dealt round-robin, so that all processes get texts of like length.
            mine = order[start + accelerator.process_index : start + step : accelerator.num_processes]
            mine = mine + [order[start]] * (batch_size - len(mine))
            ids = [list(texts[i]) for i in mine]
            (micro_batch,) = forward_batches(bare.backbone, ids, pooling=bare.pooling, batch_size=len(ids))
            out = model(**micro_batch.inputs)[micro_batch.texts.argsort()]
            gathered = accelerator.gather(out).float().cpu()
            rank_major = gathered.view(accelerator.num_processes, batch_size, -1).transpose(0, 1).flatten(0, 1)
            batch = order[start : start + step]
            if vectors is None:
                vectors = torch.empty(len(texts), gathered.shape[-1])
            vectors[torch.tensor(batch)] = rank_major[: len(batch)]
    assert vectors is not None
    return vectors
