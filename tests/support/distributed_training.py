"""Run by `accelerate launch` (two processes) from test_trainer_distributed.py: train two steps, resume after one.

Arguments: checkpoint, rows (.jsonl), folder for the results, `lora` or `full`, dtype of the weights. Writes the
trained weights of the run (`trained.safetensors`) and of one resumed after its first step (`resumed.safetensors`).
"""

import os
import sys

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf_e5 import E5Model, E5Trainer, E5TrainingArguments
from support import fsdp_on_cpu, lora_config


def train(checkpoint, rows, output_dir, kind, dtype, **options):
    args = E5TrainingArguments(
        output_dir=f"{output_dir}/run",
        per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        lr_scheduler_type="constant",
        query_max_length=48,
        passage_max_length=48,
        mini_batch_num_tokens=256,
        homogeneous_batches=False,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = E5Model.from_pretrained(checkpoint, dtype=dtype, peft_config=lora_config() if kind == "lora" else None)
    trainer = E5Trainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(20)))
    trainer.train(**options)
    return trainer


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The trained weights as training has them, gathered from all processes."""
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters([value for value in trained.values() if hasattr(value, "ds_id")]):
            return {name: value.detach().clone() for name, value in trained.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in trained.items()
    }


def main() -> None:
    checkpoint, data, output_dir, kind, dtype = sys.argv[1:]
    rows = Dataset.from_json(data)
    fsdp_on_cpu.allow()
    for name, options in {
        "trained": {},
        "resumed": {"resume_from_checkpoint": f"{output_dir}/run/checkpoint-1"},
    }.items():
        trainer = train(checkpoint, rows, output_dir, kind, dtype, **options)
        assert 0 < trainer.evaluate()["eval_loss"] < 50
        weights = whole_weights(trainer)
        if trainer.is_world_process_zero():
            save_file(weights, f"{output_dir}/{name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
