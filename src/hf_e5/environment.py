"""What a process settles before torch is imported: how its threads wait, and which library notes are not for users."""

from __future__ import annotations

import logging
import os
import time
import warnings
from typing import TYPE_CHECKING

import psutil


if TYPE_CHECKING:
    import torch


# Cores that other processes use, from which on threads should sleep while they wait.
BUSY_CORES = 0.25


def prepare_process() -> None:
    """Choose how OpenMP threads wait, and silence notes of libraries that ask nothing of the user.

    Call it before torch is imported: OpenMP reads its environment once. What the user has set stays.

    GNU OpenMP lets threads spin while they wait for one another. That is fastest on idle cores. Where another process
    wants the core, the spinning thread keeps the very thread off it that it waits for, at the end of each of the
    thousands of parallel loops of a step: a training step on two cores took ten to twenty times as long beside one
    busy process. Threads that sleep while they wait (`OMP_WAIT_POLICY=PASSIVE`) need 1.7 times as long on idle cores
    (docs/benchmarks/cpu.md).
    """
    shares_cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 or _cores_used_by_others() > BUSY_CORES
    if shares_cores and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft asks transformers by a name that transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # DeepSpeed is imported wherever it is installed, and says that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def _cores_used_by_others(seconds: float = 0.1) -> float:
    """Cores in use while this process sleeps."""
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


def fastest_dtype() -> torch.dtype:
    """The dtype in which this CPU multiplies matrices fastest: bf16 where it has the units for it, else fp32.

    CPUs without AMX emulate bf16 products, several times slower than fp32 ones; which do is measured, in a fraction
    of a second. bf16 must be clearly faster, as fp32 is the more exact.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        durations = []
        for _ in range(6):  # the first one compiles or loads the kernel
            since = time.perf_counter()
            left @ right
            durations.append(time.perf_counter() - since)
        seconds[dtype] = min(durations)
    return torch.bfloat16 if 1.5 * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32
