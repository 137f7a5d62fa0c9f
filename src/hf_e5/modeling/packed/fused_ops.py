"""The elementwise parts of a decoder layer with hand-written gradients: few passes over memory, nothing kept.

Plain functions over tensors, each compiled into one kernel where that pays: written out operation by operation, they
take longer on a CPU than the matrix products around them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


logger = logging.getLogger(__name__)

# Elements from which on compiling (seconds, once per machine) is repaid; tests and toy models stay below.
COMPILE_FROM = 2**18


def _one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` compiled on large tensors; as it is written where compiling fails (no C++ compiler, say)."""
    compiled = torch.compile(function, dynamic=True)
    is_broken = False

    @wraps(function)
    def run(tensor: Tensor, *args: Any) -> Any:
        nonlocal is_broken
        if is_broken or tensor.numel() < COMPILE_FROM:
            return function(tensor, *args)
        try:
            return compiled(tensor, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler raises: the function itself needs none
            logger.warning("%s runs uncompiled, which is slower: %s", function.__name__, str(error).split("\n", 1)[0])
            is_broken = True
            return function(tensor, *args)

    return run


@_one_kernel
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden` [T, dim] scaled to unit mean square (in fp32, rounded as transformers does), times `weight` [dim]."""
    return weight * (_upcast(hidden) * _inverse_rms(hidden, eps)).to(hidden.dtype)


@_one_kernel
def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` with respect to `hidden`; `weight` is frozen."""
    inverse = _inverse_rms(hidden, eps)
    unit, grad = _upcast(hidden) * inverse, _upcast(grad) * weight
    along = (grad * unit).mean(dim=-1, keepdim=True)
    return ((grad - unit * along) * inverse).to(hidden.dtype)


@_one_kernel
def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `states` [T, heads, d] by `cos` and `sin` [T, d]; with `-sin` its gradient."""
    half = states.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@_one_kernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, any shape."""
    return F.silu(gate) * up


@_one_kernel
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to `gate` and `up`."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_upcast(hidden).square().mean(dim=-1, keepdim=True) + eps)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
