"""Callbacks of a running training: a check of the adapter, a time limit, and the log as a table."""

from __future__ import annotations

import math
import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback


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
                "the adapter would not be trained. Usual causes: inputs that need no gradient under activation "
                "checkpointing, a frozen adapter, or target modules that the forward pass never reaches."
            )

    def _record(self, name: str):
        def hook(gradient: Tensor) -> None:
            largest = gradient.detach().abs().amax().float()
            largest = torch.nan_to_num(largest, nan=1.0)  # a NaN is a gradient, and others report it
            before = self._largest[name]
            self._largest[name] = largest if before is None else torch.maximum(before, largest)

        return hook


class FitToTime(TrainerCallback, ExportableState):
    """Shorten a run so that it ends in time: its number of steps, and with them its learning-rate schedule.

    `args.max_steps` is the most that a run gets. After `MEASURED` steps (the first one, which also loads kernels, not
    counted) it is cut to what fits, and set anew after each step of the warm-up, on which the number of steps has no
    effect. Later it is only ever cut: if steps become slower, the learning rate drops at once, and still ends where
    the schedule ends. One process only: the clocks of several would disagree.

    Args:
        seconds: From the start of training to its last step.
        least: Steps that are taken in any case.

    A resumed run keeps the number of steps (with `restore_callback_states_from_checkpoint`) and gets `seconds` anew.
    """

    MEASURED = 3

    def __init__(self, seconds: float, least: int = 8) -> None:
        self.seconds, self.least = seconds, least
        self.max_steps: int | None = None  # None until the first steps are measured
        self._durations: list[float] = []

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        self._started = self._step_ended = time.monotonic()
        if self.max_steps is not None:
            self._cut(self.max_steps, state, lr_scheduler)

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        now = time.monotonic()
        self._durations.append(now - self._step_ended)
        self._step_ended = now
        if len(self._durations) <= self.MEASURED:
            return
        left = self.seconds - (now - self._started)
        fitting = math.floor(left / statistics.median(self._durations[-self.MEASURED :]))
        most = max(state.global_step + fitting, self.least)
        is_warming_up = state.global_step <= _keywords(lr_scheduler).get("num_warmup_steps", 0)
        if self.max_steps is None or most < self.max_steps or is_warming_up:
            self._cut(min(most, args.max_steps), state, lr_scheduler)
            control.should_training_stop = state.global_step >= state.max_steps

    def _cut(self, max_steps: int, state: Any, lr_scheduler: Any) -> None:
        self.max_steps = state.max_steps = max_steps
        if "num_training_steps" in (keywords := _keywords(lr_scheduler)):  # not in a constant schedule
            keywords["num_training_steps"] = max_steps

    def state(self) -> dict:
        return {
            "args": {"seconds": self.seconds, "least": self.least},
            "attributes": {"max_steps": self.max_steps},
        }


def _keywords(lr_scheduler: Any) -> dict[str, Any]:
    """The keyword arguments that transformers' schedule function is called with, to be changed in place."""
    schedule = lr_scheduler.lr_lambdas[0]  # one for all parameter groups
    return schedule.keywords if isinstance(schedule, partial) else {}


class LogTable(ProgressCallback):
    """The training log as a table, above the progress bar where there is a terminal."""

    # Field of the log: head of its column, format.
    COLUMNS = {
        "loss": ("loss", "{:.3f}"),
        "accuracy": ("accuracy", "{:.3f}"),
        "positive_similarity": ("positive", "{:.3f}"),
        "negative_similarity": ("negative", "{:.3f}"),
        "hard_negative_similarity": ("hard neg.", "{:.3f}"),
        "grad_norm": ("grad norm", "{:.2f}"),
        "learning_rate": ("lr", "{:.1e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
    }

    def __init__(self) -> None:
        super().__init__()
        self._has_head = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            hidden = args.disable_tqdm or not sys.stderr.isatty()
            self.training_bar = tqdm(total=state.max_steps, desc="training", dynamic_ncols=True, disable=hidden)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs:  # an evaluation, or the summary at the end
            shown = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
            _write("  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
            return
        if not self._has_head:
            _write(" ".join([f"{'step':>6}", *(f"{head:>9}" for head, _ in self.COLUMNS.values())]))
            self._has_head = True
        cells = [form.format(logs.get(name, math.nan)) for name, (_, form) in self.COLUMNS.items()]
        cells = ["" if cell == "nan" else cell for cell in cells]  # no hard negatives in these batches, say
        _write(" ".join([f"{state.global_step:>6}", *(f"{cell:>9}" for cell in cells)]))


def _write(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()  # where a file or a pipe is written to, the line would wait for thousands of others
