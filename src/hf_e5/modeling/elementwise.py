"""The elementwise parts of a decoder layer with hand-written gradients: few passes over memory, nothing kept.

Plain functions over tensors. On CUDA each is compiled into one kernel on first use; on a CPU they run as written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor
from torch.nn import functional as F


def _one_kernel_on_cuda(function: Callable) -> Callable:
    compiled = cache(lambda: torch.compile(function, dynamic=True))

    @wraps(function)
    def run(tensor: Tensor, *args):
        return (compiled() if tensor.is_cuda else function)(tensor, *args)

    return run


@_one_kernel_on_cuda
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden` [T, dim] scaled to unit mean square (in fp32, rounded as transformers does), times `weight` [dim]."""
    return weight * (_upcast(hidden) * _inverse_rms(hidden, eps)).to(hidden.dtype)


@_one_kernel_on_cuda
def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` with respect to `hidden`; `weight` is frozen."""
    inverse = _inverse_rms(hidden, eps)
    unit, grad = _upcast(hidden) * inverse, _upcast(grad) * weight
    along = (grad * unit).mean(dim=-1, keepdim=True)
    return ((grad - unit * along) * inverse).to(hidden.dtype)


@_one_kernel_on_cuda
def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `states` [T, heads, d] by `cos` and `sin` [T, d]; with `-sin` its gradient."""
    half = states.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = states[..., :half], states[..., half:]
    rotated = torch.empty_like(states, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


@_one_kernel_on_cuda
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, any shape."""
    return F.silu(gate) * up


@_one_kernel_on_cuda
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to `gate` and `up`."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_upcast(hidden).square().mean(dim=-1, keepdim=True) + eps)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
