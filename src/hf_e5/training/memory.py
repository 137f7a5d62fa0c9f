"""How much memory there is, and how much of it the graph of a forward pass takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn


# Limit and usage of this process's control group (a container), in bytes; v2 and v1 of the kernel interface.
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: on its accelerator, or of main memory in the container's limit.

    Main memory is divided among the processes of this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    for limit_file, usage_file in CGROUP_FILES:
        try:
            limit, usage = Path(limit_file).read_text().strip(), int(Path(usage_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            free = min(free, int(limit) - usage)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def graph_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, without parameters and buffers of `module`."""
    own = {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        # By type, not by address: ZeRO-3 and FSDP gather parameters for the forward pass and free them after it.
        is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        if not is_parameter and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())
