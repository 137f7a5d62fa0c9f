"""The step against plain autograd: one joint backward of a padded forward in float64 (invariant 3)."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from hf_e5.data.collator import E5DataCollator
from hf_e5.errors import InputError
from hf_e5.modeling.packed import decoder
from hf_e5.training import gradcache
from hf_e5.training.memory import graph_bytes
from support.step_reference import make_model, make_rows, make_step, reference, relative_error, run_step


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return make_model(tiny_checkpoint)


@pytest.mark.parametrize("keep", [0, 300, "auto"], ids=["recompute", "keep some", "keep all"])
@pytest.mark.parametrize("mask_duplicates", [True, False])
def test_step_equals_joint_backward(model, keep, mask_duplicates):
    rows = make_rows(11)
    loss, expected = reference(model, rows, mask_duplicates)
    output, grads = run_step(
        model, E5DataCollator()(rows), keep_graph_num_tokens=keep, mask_duplicates=mask_duplicates
    )
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert relative_error(grads, expected) < 1e-5


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("path", ["transformers' modules", "padded"])
def test_other_paths_equal_joint_backward(model, monkeypatch, path, padding_side):
    """Backbones that the fused layers do not know run packed through their own modules; encoders run padded."""
    monkeypatch.setattr(decoder, "FUSABLE", set())
    if path == "padded":
        monkeypatch.setattr(decoder, "PACKABLE", set())
    monkeypatch.setattr(model.tokenizer, "padding_side", padding_side)
    rows = make_rows(7)
    loss, expected = reference(model, rows)
    output, grads = run_step(model, E5DataCollator()(rows))
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert relative_error(grads, expected) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "first"])
def test_other_poolings_equal_the_padded_forward(model, monkeypatch, pooling):
    monkeypatch.setattr(model, "pooling", pooling)
    batch = E5DataCollator()(make_rows(5))
    output, grads = run_step(model, batch)
    monkeypatch.setattr(decoder, "PACKABLE", set())
    expected_output, expected = run_step(model, batch)
    assert output.loss.item() == pytest.approx(expected_output.loss.item(), rel=1e-5)
    for name, value in expected.items():
        # With `first` the first token sees itself alone: queries and keys have no gradient at all.
        torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_equals_joint_backward(tiny_checkpoint):
    model = make_model(tiny_checkpoint, use_peft=False)
    rows = make_rows(7)
    _, expected = reference(model, rows)
    _, grads = run_step(model, E5DataCollator()(rows))
    assert relative_error(grads, expected) < 1e-5


def test_activation_checkpointing_changes_nothing(tiny_checkpoint):
    """The gradient stays; a graph that recomputes one of the two layers, or both, is smaller each time."""
    model, batch = make_model(tiny_checkpoint), E5DataCollator()(make_rows(7))
    micro_batch = make_step(model).plan(batch).kept[0]
    sizes = [graph_bytes(lambda: model(**micro_batch.inputs), model)]
    _, expected = run_step(model, batch)
    for every_n_layers in (2, 1):
        model.activation_checkpointing_enable(every_n_layers=every_n_layers)
        _, grads = run_step(model, batch)
        assert relative_error(grads, expected) < 1e-6
        sizes.append(graph_bytes(lambda: model(**micro_batch.inputs), model))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("is_fused", [True, False])
def test_dropout_is_replayed(tiny_checkpoint, monkeypatch, is_fused):
    """Recomputing draws the masks of the first pass: the gradient is that of kept graphs, and differs by seed."""
    if not is_fused:
        monkeypatch.setattr(decoder, "FUSABLE", set())
    model, batch = make_model(tiny_checkpoint, dropout=0.3), E5DataCollator()(make_rows(7))
    results = []
    for seed, keep in [(1, 10**9), (1, 0), (2, 0)]:
        torch.manual_seed(seed)
        results.append(run_step(model, batch, keep_graph_num_tokens=keep)[1])
    assert relative_error(results[1], results[0]) < 1e-6
    assert relative_error(results[2], results[0]) > 1e-2


def test_dropout_gradient_is_the_derivative_of_the_loss(tiny_checkpoint):
    """With the seed fixed the step is a function: its gradient along a direction equals a finite difference."""
    model, batch = make_model(tiny_checkpoint, dropout=0.3), E5DataCollator()(make_rows(5))

    def loss_and_grads():
        torch.manual_seed(3)
        output, grads = run_step(model, batch, temperature=0.5)
        return output.loss.item(), grads

    _, grads = loss_and_grads()
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in grads:
                    parameter.add_(grads[name] / norm, alpha=step)
        values.append(loss_and_grads()[0])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in grads:
                    parameter.sub_(grads[name] / norm, alpha=step)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(norm.item(), rel=1e-2)


def test_bf16_stays_close(tiny_checkpoint):
    """bf16 weights and activations: a direction within a few degrees of the float64 gradient."""
    model, rows = make_model(tiny_checkpoint, dtype=torch.bfloat16), make_rows(11)
    _, grads = run_step(model, E5DataCollator()(rows))
    _, expected = reference(model, rows)
    flat, expected_flat = (torch.cat([value.flatten().double() for value in g.values()]) for g in (grads, expected))
    assert torch.cosine_similarity(flat, expected_flat, dim=0) > 0.995


@pytest.mark.parametrize("rows", [make_rows(1)[:1], [{"query_ids": [3], "positive_ids": [4], "negative_ids": [[5]]}]])
def test_one_row_and_one_token(model, rows):
    loss, expected = reference(model, rows)
    output, grads = run_step(model, E5DataCollator()(rows))
    assert output.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name].double(), value, rtol=1e-4, atol=1e-6)


def test_loss_scale_and_accumulation(model):
    first, second = E5DataCollator()(make_rows(4)), E5DataCollator()(make_rows(4, seed=1))
    (_, grads_first), (_, grads_second) = run_step(model, first), run_step(model, second)
    model.zero_grad()
    step = make_step(model)
    for batch in (first, second):
        step(batch, loss_scale=0.5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, (grads_first[name] + grads_second[name]) / 2)


def test_statistics(model):
    output, _ = run_step(model, E5DataCollator()(make_rows(6)))
    values = {name: value.item() for name, value in output.statistics.items()}
    assert 0 <= values["accuracy"] <= values["mrr"] <= 1
    assert all(-1 <= values[f"{kind}_similarity"] <= 1 for kind in ("positive", "negative", "hard_negative"))
    assert 0 < values["num_negatives"] < 18


def test_auto_keeps_what_the_free_memory_allows(model, monkeypatch):
    """From nothing but the first micro-batch to everything, as memory grows; the gradient stays the same."""
    batch = E5DataCollator()(make_rows(11))
    grads = {}
    for free in (0, 3_000_000, 10**12):
        monkeypatch.setattr(gradcache, "free_memory", lambda device, free=free: free)
        step = make_step(model, keep_graph_num_tokens="auto")
        plan = step.plan(batch)
        grads[len(plan.recomputed)] = run_step(model, batch, keep_graph_num_tokens="auto")[1]
    recomputed = list(grads)
    assert recomputed == sorted(recomputed, reverse=True) and recomputed[-1] == 0 and len(set(recomputed)) == 3
    assert relative_error(grads[recomputed[0]], grads[0]) < 1e-6


def test_fsdp_version_1_is_refused(model):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(InputError, match="FSDP is not supported: use .* FSDP version 2"):
        make_step(model, accelerator)
