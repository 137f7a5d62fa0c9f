"""Linear layers with a frozen weight and a LoRA adapter, several on one input at a time.

The parameters are those of peft's modules, so checkpoints, optimizers and merging work as ever. There are no
gradients of frozen weights, no inputs kept for them and no casts of activations to the adapter's fp32. Inputs that
several layers share are kept once, or not at all where recomputing them is a single elementwise pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from .fused_ops import rms_norm, rms_norm_backward, swiglu, swiglu_backward


@dataclass(frozen=True)
class Projection:
    """One linear layer: `x W^T + bias + scaling * dropout(x) A^T B^T`; without an adapter `lora_A` is None."""

    weight: Tensor  # [out, in], frozen
    bias: Tensor | None  # [out], frozen
    lora_A: Tensor | None = None  # [r, in], trains
    lora_B: Tensor | None = None  # [out, r], trains
    scaling: float = 1.0
    dropout: float = 0.0

    @classmethod
    def of(cls, module: nn.Module) -> Projection | None:
        """Read a `Linear` or peft's LoRA `Linear`; None if it does more than this class says, or its base trains."""
        if has_hooks(module) or hasattr(getattr(module, "weight", None), "ds_id"):  # ZeRO-3: weights elsewhere
            return None
        if type(module) is nn.Linear:
            trains = any(parameter.requires_grad for parameter in module.parameters())
            # `encode` needs no gradient of them; not `no_grad`, under which GradCache must go the way of its replay.
            trains = trains and not torch.is_inference_mode_enabled()
            return None if trains else cls(module.weight, module.bias)
        if type(module) is not LoraLinear or module.disable_adapters or module.merged or module.fan_in_fan_out:
            return None
        base = cls.of(module.get_base_layer())
        names = [name for name in module.active_adapters if name in module.lora_A]
        if base is None or len(names) != 1 or module.lora_variant:
            return None
        name = names[0]
        adapter: Any = (module.lora_A[name], module.lora_B[name])
        dropout = module.lora_dropout[name]
        if any(has_hooks(part) or part.bias is not None or hasattr(part.weight, "ds_id") for part in adapter):
            return None
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        lora_A, lora_B = adapter[0].weight, adapter[1].weight
        return cls(base.weight, base.bias, lora_A, lora_B, module.scaling[name], probability)


def norm_linear(hidden: Tensor, norm: nn.Module, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`projection(rms_norm(hidden))` for each projection: [T, in] -> [T, out] each. Keeps `hidden` for backward."""
    weights = norm.weight, norm.variance_epsilon
    return _NormLinear.apply(hidden, weights, projections, *_adapters(projections))


def linear_residual(inputs: Tensor, residual: Tensor, projection: Projection) -> Tensor:
    """`residual + projection(inputs)`. Keeps `inputs` for backward."""
    return _LinearResidual.apply(inputs, residual, projection, *_adapters([projection]))


def swiglu_linear_residual(gate: Tensor, up: Tensor, residual: Tensor, projection: Projection) -> Tensor:
    """`residual + projection(silu(gate) * up)`. Keeps `gate` and `up` for backward."""
    return _SwiGLULinearResidual.apply(gate, up, residual, projection, *_adapters([projection]))


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, norm, projections, *adapters):
        normed = rms_norm(hidden, *norm)
        kept, scale = _dropout(normed, projections)
        dropped = _apply(normed, kept, scale)
        outputs, inner = zip(*(_forward(normed, dropped, projection) for projection in projections), strict=True)
        ctx.save_for_backward(hidden, kept, *inner)
        ctx.norm, ctx.projections, ctx.scale = norm, projections, scale
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, kept, *inner = ctx.saved_tensors
        normed = rms_norm(hidden, *ctx.norm)
        grad, adapter_grads = _backward(
            grads, normed, kept, ctx.scale, inner, ctx.projections, ctx.needs_input_grad[0]
        )
        if grad is not None:
            grad = rms_norm_backward(grad, hidden, *ctx.norm)
        return grad, None, None, *adapter_grads


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, residual, projection, *adapter):
        kept, scale = _dropout(inputs, [projection])
        output, inner = _forward(inputs, _apply(inputs, kept, scale), projection)
        ctx.save_for_backward(inputs, kept, inner)
        ctx.projection, ctx.scale = projection, scale
        return output.add_(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        inputs, kept, inner = ctx.saved_tensors
        grad, adapter_grads = _backward([grad_output], inputs, kept, ctx.scale, [inner], [ctx.projection], True)
        return grad, grad_output, None, *adapter_grads


class _SwiGLULinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, residual, projection, *adapter):
        inputs = swiglu(gate, up)
        kept, scale = _dropout(inputs, [projection])
        output, inner = _forward(inputs, _apply(inputs, kept, scale), projection)
        ctx.save_for_backward(gate, up, kept, inner)
        ctx.projection, ctx.scale = projection, scale
        return output.add_(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        gate, up, kept, inner = ctx.saved_tensors
        inputs = swiglu(gate, up)
        grad, adapter_grads = _backward([grad_output], inputs, kept, ctx.scale, [inner], [ctx.projection], True)
        grad_gate, grad_up = swiglu_backward(grad, gate, up)
        return grad_gate, grad_up, grad_output, None, *adapter_grads


def _adapters(projections: Sequence[Projection]) -> list[Tensor | None]:
    """The trainable parameters, as arguments that autograd sees; the frozen ones travel inside the projections."""
    return [parameter for projection in projections for parameter in (projection.lora_A, projection.lora_B)]


def _dropout(inputs: Tensor, projections: Sequence[Projection]) -> tuple[Tensor | None, float]:
    """Draw which inputs the adapters see: a bool mask (one for all that share the input) and the scale of the rest."""
    probability = max(projection.dropout for projection in projections)
    if not probability:
        return None, 1.0
    return torch.rand(inputs.shape, dtype=torch.float32, device=inputs.device) >= probability, 1 / (1 - probability)


def _apply(inputs: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    return inputs if kept is None else (inputs * kept).mul_(scale)


def _forward(inputs: Tensor, dropped: Tensor, projection: Projection) -> tuple[Tensor, Tensor | None]:
    output = F.linear(inputs, projection.weight, projection.bias)
    if projection.lora_A is None or projection.lora_B is None:
        return output, None
    inner = F.linear(dropped, projection.lora_A.to(inputs.dtype))  # [T, r]
    return output.addmm_(inner, projection.lora_B.to(inputs.dtype).T, alpha=projection.scaling), inner


def _backward(
    grads: Sequence[Tensor],
    inputs: Tensor,
    kept: Tensor | None,
    scale: float,
    inner: Sequence[Tensor | None],
    projections: Sequence[Projection],
    needs_grad: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients with respect to the shared input (None unless needed) and each adapter's A and B."""
    dropped = _apply(inputs, kept, scale)
    grad_inputs = grad_dropped = None
    adapter_grads: list[Tensor | None] = []
    for grad, projected, projection in zip(grads, inner, projections, strict=True):
        if needs_grad:
            grad_inputs = _add_product(grad_inputs, grad, projection.weight)
        if projected is None or projection.lora_A is None or projection.lora_B is None:
            adapter_grads += [None, None]
            continue
        lora_A, lora_B = projection.lora_A, projection.lora_B
        grad_inner = torch.mm(grad, lora_B.to(grad.dtype)).mul_(projection.scaling)  # [T, r]
        adapter_grads += [
            torch.mm(grad_inner.T, dropped).to(lora_A.dtype),
            torch.mm(grad.T, projected).mul_(projection.scaling).to(lora_B.dtype),
        ]
        if needs_grad and kept is None:
            grad_inputs = _add_product(grad_inputs, grad_inner, lora_A.to(grad.dtype))
        elif needs_grad:
            grad_dropped = _add_product(grad_dropped, grad_inner, lora_A.to(grad.dtype))
    if grad_inputs is not None and grad_dropped is not None:
        grad_inputs += _apply(grad_dropped, kept, scale)
    return grad_inputs, adapter_grads


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else total.addmm_(left, right)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`: FSDP, ZeRO-3 and offloading gather weights there."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
