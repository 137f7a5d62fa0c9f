"""Checks and figures of a running training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class LoraGradientCheck(TrainerCallback):
    """Fail after the first step unless every LoRA pair got a gradient.

    A LoRA run whose adapter never learns looks healthy: the loss is finite and the checkpoint loads, but the model is
    the base model. Hooks see the gradients under every engine (DDP, and ZeRO-3 where `.grad` is empty). The second
    matrix of a pair must get a non-zero one; the first starts behind a zero and gets zeros in the first step.
    """

    def __init__(self) -> None:
        self._largest: dict[str, Tensor | None] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
                self._largest[name] = None
                self._handles.append(parameter.register_hook(self._record(name)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self._handles:
            return
        for name, parameter in model.named_parameters():
            if name in self._largest and isinstance(parameter.grad, DTensor):  # of FSDP, which calls no hooks
                self._record(name)(parameter.grad.full_tensor())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        bad = [
            name
            for name, largest in self._largest.items()
            if largest is None or ("lora_B" in name and not bool(largest > 0))
        ]
        if bad:
            raise RuntimeError(
                f"{len(bad)} of {len(self._largest)} LoRA tensors got no gradient in the first step, e.g. {bad[0]}: "
                "the adapter would stay what it is. Usual causes: inputs that need no gradient under activation "
                "checkpointing, a frozen adapter, or target modules that the forward pass never reaches."
            )

    def _record(self, name: str):
        def hook(gradient: Tensor) -> None:
            largest = gradient.detach().abs().amax().float()
            largest = torch.nan_to_num(largest, nan=1.0)  # a NaN is a gradient, and others report it
            before = self._largest[name]
            self._largest[name] = largest if before is None else torch.maximum(before, largest)

        return hook


class RunningMeans:
    """Means of the step statistics since the last log; values stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, value in statistics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, Tensor]:
        """Return the means and start anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self.__init__()  # type: ignore[misc]
        return means
