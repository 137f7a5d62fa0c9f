"""`hf-e5 train`: fine-tune a model.

Its flags are the fields of three dataclasses and are parsed by `hf_e5.config.parse_config`, as in
`recipes/train_mistral.py`, which does the same where `accelerate launch` wants a script.
"""

from __future__ import annotations

from ..config import parse_config
from ..training.arguments import DataArguments, E5TrainingArguments, ModelArguments
from ..training.run import train


def run_argv(argv: list[str]) -> None:
    model_args, data_args, training_args = parse_config(
        (ModelArguments, DataArguments, E5TrainingArguments), argv, prog="hf-e5 train"
    )
    trainer = train(model_args, data_args, training_args)
    if trainer.is_world_process_zero():
        print(f"wrote {training_args.output_dir}; next: hf-e5 export {training_args.output_dir} OUT")
