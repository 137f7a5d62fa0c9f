"""FSDP 2 over gloo: torch runs it on the CPU, accelerate only chooses it on an accelerator."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


_original = AcceleratorState.__init__


def _init(self, *args, fsdp_plugin=None, **kwargs) -> None:
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        # What accelerate does where it finds a GPU.
        self.distributed_type = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    elif "fsdp_plugin" in self.__dict__:
        self.distributed_type = DistributedType.FSDP  # the state is shared, and set up again from the process's


def allow() -> None:
    AcceleratorState.__init__ = _init
