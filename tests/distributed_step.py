"""Run by `torchrun` (two processes) from test_gradcache_distributed.py: the step under DDP and every ZeRO stage.

Each process holds half of the rows, unevenly cut; the gradient of the whole step must be that of one process with all
rows. Rank 0 prints one JSON line per case: its name and the largest relative error over all trained tensors.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from step_reference import arguments, make_model, make_rows, reference, relative_error
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_e5.data.collator import E5DataCollator
from hf_e5.training.gradcache import ContrastiveStep


# A step of plain gradient descent this large turns weights into gradients: (before - after) / LEARNING_RATE.
LEARNING_RATE = 1000.0

# Processes cut their rows into different numbers of micro-batches, and keep none, some or all of the graphs.
VARIANTS = {
    "recompute": {"keep_graph_num_tokens": 0},
    "keep some": {"keep_graph_num_tokens": 300},
    "keep all": {"keep_graph_num_tokens": 10**9},
    "one micro-batch": {"mini_batch_num_tokens": 10**6},
}


def prepare(model, stage: int | None):
    """Accelerator and prepared model: DDP without a stage, else DeepSpeed ZeRO."""
    AcceleratorState._reset_state()
    plugin = None
    if stage is not None:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
        plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=stage is None, deepspeed_plugin=plugin)
    expected = DistributedType.MULTI_CPU if stage is None else DistributedType.DEEPSPEED
    assert accelerator.distributed_type == expected, accelerator.distributed_type
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert stage is None or model.zero_optimization_stage() == stage
    return accelerator, model, optimizer


def full_parameters(model, stage: int | None) -> dict[str, torch.Tensor]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if stage != 3:
        return {name: value.detach().clone() for name, value in trained.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: value.detach().clone() for name, value in trained.items()}


def measure(checkpoint: Path, stage: int | None, use_peft: bool, options: dict) -> float:
    rows = make_rows(13)
    model = make_model(checkpoint, use_peft=use_peft)
    _, expected = reference(model, rows)
    accelerator, prepared, optimizer = prepare(model, stage)
    mine = rows[:9] if torch.distributed.get_rank() == 0 else rows[9:]
    before = full_parameters(model, stage)
    ContrastiveStep(prepared, arguments(**options), accelerator)(E5DataCollator()(mine))
    optimizer.step()  # DeepSpeed has stepped in its last backward, and ignores this
    after = full_parameters(model, stage)
    if stage is not None:
        prepared.destroy()
        unset_hf_deepspeed_config()  # or ZeRO-3 would already partition the next model while it is loaded
    grads = {name: (before[name] - after[name]) / LEARNING_RATE for name in expected}
    return relative_error(grads, expected)


def main() -> None:
    checkpoint = Path(sys.argv[1])
    stages = [None if name == "ddp" else int(name) for name in sys.argv[2].split(",")]
    variants = sys.argv[3].split(",") if len(sys.argv) > 3 else list(VARIANTS)
    for stage, use_peft, name in itertools.product(stages, (True, False), variants):
        error = measure(checkpoint, stage, use_peft, VARIANTS[name])
        case = f"{'DDP' if stage is None else f'ZeRO-{stage}'}, {'LoRA' if use_peft else 'full'}, {name}"
        if torch.distributed.get_rank() == 0:
            print(json.dumps({"case": case, "error": error}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
