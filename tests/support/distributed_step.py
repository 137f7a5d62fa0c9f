"""Run by `torchrun` (two processes) from test_gradcache_distributed.py: the step under DDP, ZeRO-1, 2, 3 and FSDP 2.

Each process holds half of the rows, unevenly cut; the gradient of the whole step must be that of one process with all
rows. Rank 0 prints one JSON line per case: its name, the largest relative error over all trained tensors (`error`),
and that of the whole gradient (`overall`).

Arguments: checkpoint, wrappers (`ddp,1,2,3,fsdp2`), precision (`no`, `bf16` or `fp16`).
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from deepspeed.utils import safe_get_full_fp32_param
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_e5.data.collator import E5DataCollator
from support import fsdp_on_cpu
from support.step_reference import flat_error, make_model, make_rows, make_step, reference, relative_error


# A step of plain gradient descent this large turns weights into gradients: (before - after) / LEARNING_RATE.
LEARNING_RATE = 1000.0

# Processes cut their rows into different numbers of micro-batches, and keep none, some or all of the graphs.
VARIANTS = {
    "recompute": {"keep_graph_num_tokens": 0},
    "keep some": {"keep_graph_num_tokens": 300},
    "keep all": {"keep_graph_num_tokens": "auto"},
    "one micro-batch": {"mini_batch_num_tokens": 10**6},
}
TYPES = {"ddp": DistributedType.MULTI_CPU, "fsdp2": DistributedType.FSDP}
NAMES = {"ddp": "DDP", "fsdp2": "FSDP 2", "1": "ZeRO-1", "2": "ZeRO-2", "3": "ZeRO-3"}
# The precision of the weights as they are loaded; fp16 is meant for fp32 weights, which DeepSpeed casts itself.
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}


def deepspeed_plugin(stage: int) -> DeepSpeedPlugin:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": "auto", "loss_scale": 256},
    }
    return DeepSpeedPlugin(hf_ds_config=config)


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """As the recipe and the trainer set it."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.float32) if precision == "bf16" else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["MistralDecoderLayer"],
        mixed_precision_policy=policy,
    )


def prepare(model, wrapper: str, precision: str):
    """Accelerator, prepared model and its optimizer."""
    AcceleratorState._reset_state()
    plugins = {}
    if wrapper.isdigit():
        plugins["deepspeed_plugin"] = deepspeed_plugin(int(wrapper))
    elif wrapper == "fsdp2":
        plugins["fsdp_plugin"] = fsdp_plugin(precision)
    accelerator = Accelerator(cpu=not wrapper.isdigit(), mixed_precision=precision, **plugins)
    expected = TYPES.get(wrapper, DistributedType.DEEPSPEED)
    assert accelerator.distributed_type == expected, accelerator.distributed_type
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert not wrapper.isdigit() or model.zero_optimization_stage() == int(wrapper)
    return accelerator, model, optimizer


def full_parameters(model) -> dict[str, torch.Tensor]:
    """The trained weights as the optimizer has them: whole, and in fp32 where it keeps such a copy."""

    def whole(parameter: torch.Tensor) -> torch.Tensor:
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            return safe_get_full_fp32_param(parameter)
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    return {name: whole(value).detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def measure(checkpoint: Path, wrapper: str, precision: str, use_peft: bool, options: dict) -> dict[str, float]:
    rows, dtype = make_rows(13), DTYPES[precision]
    _, expected = reference(make_model(checkpoint, use_peft=use_peft, dtype=dtype), rows)
    model = make_model(checkpoint, use_peft=use_peft, dtype=dtype)
    accelerator, prepared, optimizer = prepare(model, wrapper, precision)
    mine = rows[:9] if torch.distributed.get_rank() == 0 else rows[9:]
    before = full_parameters(model)
    make_step(prepared, accelerator, **options)(E5DataCollator()(mine))
    if wrapper == "ddp":
        grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    else:
        optimizer.step()  # DeepSpeed has stepped in its last backward, and ignores this
        after = full_parameters(model)
        grads = {name: (before[name] - after[name]) / LEARNING_RATE for name in expected}
    if wrapper.isdigit():
        prepared.destroy()
        unset_hf_deepspeed_config()  # or ZeRO-3 would already partition the next model while it is loaded
    return {"error": relative_error(grads, expected), "overall": flat_error(grads, expected)}


def main() -> None:
    checkpoint, wrappers, precision = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
    fsdp_on_cpu.allow()
    for wrapper, use_peft, name in itertools.product(wrappers, (True, False), VARIANTS):
        errors = measure(checkpoint, wrapper, precision, use_peft, VARIANTS[name])
        case = f"{NAMES[wrapper]}, {'LoRA' if use_peft else 'full'}, {name}"
        if precision != "no":
            case += f", {precision}"
        if torch.distributed.get_rank() == 0:
            print(json.dumps({"case": case, **errors}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
