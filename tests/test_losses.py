import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hf_e5.training.losses import info_nce, matryoshka_info_nce


def embeddings(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def reference(queries, documents, positives, temperature=0.02, mask=None):
    """Plain autograd over the whole [B, N] matrix."""
    queries, documents = queries.detach().requires_grad_(), documents.detach().requires_grad_()
    logits = queries @ documents.T / temperature
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    loss = F.cross_entropy(logits, positives)
    loss.backward()
    return loss.detach(), queries.grad, documents.grad


def assert_equal(output, expected):
    values = (output.loss, output.grad_queries, output.grad_documents)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 5, 512])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_value_and_gradients_equal_autograd(chunk_size, temperature):
    queries, documents = embeddings(17, 8), embeddings(40, 8, seed=1)
    positives = torch.randint(0, 40, (17,), generator=torch.Generator().manual_seed(2))
    output = info_nce(queries, documents, positives, temperature=temperature, chunk_size=chunk_size)
    assert_equal(output, reference(queries, documents, positives, temperature))


def test_half_precision_embeddings_are_computed_in_fp32():
    queries, documents = embeddings(64, 32).bfloat16(), embeddings(128, 32, seed=1).bfloat16()
    positives = torch.arange(64)
    output = info_nce(queries, documents, positives)
    expected = reference(queries.double(), documents.double(), positives)
    assert output.grad_queries.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.grad_documents.double(), expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_function", [False, True])
def test_masked_documents_have_no_part(as_function):
    queries, documents, positives = embeddings(9, 8), embeddings(20, 8, seed=1), torch.arange(9)
    mask = torch.rand(9, 20, generator=torch.Generator().manual_seed(3)) < 0.4
    argument = (lambda start, stop: mask[start:stop]) if as_function else mask
    output = info_nce(queries, documents, positives, mask=argument, chunk_size=4)
    hidden = mask.scatter(1, positives[:, None], False)  # a positive is never hidden
    assert_equal(output, reference(queries, documents, positives, mask=hidden))
    assert output.num_negatives.item() == pytest.approx((~hidden).sum().item() / 9 - 1)


def test_column_mask_equals_removing_the_documents():
    queries, documents, positives = embeddings(6, 8), embeddings(12, 8, seed=1), torch.arange(6)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 9:] = True
    output = info_nce(queries, documents, positives, mask=mask)
    fewer = info_nce(queries, documents[:9], positives)
    torch.testing.assert_close(output.loss, fewer.loss)
    torch.testing.assert_close(output.grad_documents[:9], fewer.grad_documents)
    assert output.grad_documents[9:].abs().max() == 0


def test_margin_leaves_out_documents_above_the_positive():
    queries, documents, positives = embeddings(16, 4), embeddings(32, 4, seed=1), torch.arange(16)
    similarity = queries @ documents.T
    mask = similarity > similarity[torch.arange(16), positives][:, None] + 0.1
    assert mask.any()
    output = info_nce(queries, documents, positives, false_negative_margin=0.1, chunk_size=3)
    assert_equal(output, reference(queries, documents, positives, mask=mask))


def test_statistics():
    queries, documents, positives = embeddings(50, 6), embeddings(80, 6, seed=1), torch.arange(50)
    output = info_nce(queries, documents, positives, chunk_size=7)
    similarity = queries @ documents.T
    positive = similarity.diagonal()
    rank = (similarity > positive[:, None]).sum(1) + 1
    assert output.accuracy.item() == pytest.approx((rank == 1).double().mean().item())
    assert output.mrr.item() == pytest.approx((1 / rank).mean().item())
    assert output.positive_similarity.item() == pytest.approx(positive.mean().item())
    assert output.negative_similarity.item() == pytest.approx(((similarity.sum() - positive.sum()) / (50 * 79)).item())
    assert output.num_negatives.item() == 79


def test_one_query_and_one_document():
    output = info_nce(embeddings(1, 4), embeddings(1, 4, seed=1), torch.tensor([0]))
    assert output.loss == 0 and output.grad_queries.abs().max() == 0 and output.accuracy == 1


def test_far_logits_do_not_overflow():
    queries, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    output = info_nce(queries, documents, torch.tensor([0]), temperature=0.001)
    assert output.loss.item() == pytest.approx(2000) and torch.isfinite(output.grad_queries).all()


def test_matryoshka_equals_autograd():
    queries, documents, positives = embeddings(10, 16), embeddings(24, 16, seed=1), torch.arange(10)
    output = matryoshka_info_nce(queries, documents, positives, dims=[4, 16, 8], temperature=0.1)
    leaves = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    losses = []
    for dim in (4, 8, 16):
        query, document = (F.normalize(leaf[:, :dim], dim=-1) for leaf in leaves)
        losses.append(F.cross_entropy(query @ document.T / 0.1, positives))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert_equal(output, (loss.detach(), leaves[0].grad, leaves[1].grad))


@pytest.mark.parametrize(
    "shapes, message", [(((2, 4), (3, 5), 2), "expected \\[B, D\\]"), (((2, 4), (3, 4), 1), "one positive per query")]
)
def test_wrong_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        info_nce(embeddings(*shapes[0]), embeddings(*shapes[1]), torch.zeros(shapes[2], dtype=torch.int64))


MEMORY_SCRIPT = """
import resource, torch
from hf_e5.training.losses import info_nce
documents, queries, positives = torch.randn(65_536, 1024), torch.randn(1024, 1024), torch.arange(1024)
info_nce(queries[:2], documents[:2], positives[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
info_nce(queries, documents, positives)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_memory_at_65536_documents_stays_under_one_gigabyte():
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000
