"""The step under autocast on fp32 weights, and under a real gradient scaler."""

import pytest
import torch
from accelerate import Accelerator

from hf_e5.data.collator import E5DataCollator
from support.step_reference import flat_error, make_model, make_rows, make_step, reference, relative_error


def gradients(model, rows, *, scale=None, **options):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    make_step(model, accelerator, **options)(E5DataCollator()(rows))
    if scale is not None:
        accelerator.scaler.unscale_(optimizer)
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.06), (torch.float16, 0.01)], ids=["bf16", "fp16"])
def test_autocast_on_fp32_weights(tiny_checkpoint, use_peft, dtype, limit):
    rows = make_rows(13)
    _, expected = reference(make_model(tiny_checkpoint, use_peft=use_peft), rows)
    model = make_model(tiny_checkpoint, use_peft=use_peft)
    model.forward = torch.autocast("cpu", dtype)(model.forward)  # as accelerate does
    assert flat_error(gradients(model, rows), expected) < limit


@pytest.mark.parametrize("keep", [0, 300, 10**9])
def test_a_scaled_loss_changes_nothing(tiny_checkpoint, keep):
    """Kept and recomputed backward passes are scaled alike: powers of two cancel exactly."""
    rows = make_rows(13)
    plain, scaled = (
        gradients(make_model(tiny_checkpoint), rows, scale=scale, keep_graph_num_tokens=keep)
        for scale in (None, 2.0**16)
    )
    assert relative_error(scaled, plain) == 0
