"""`hf-e5 train --config F`: the recipe script's wiring in one process, for where the repository is not at hand.

For several GPUs, or to change anything, launch `recipes/train_mistral.py`.
"""

from __future__ import annotations

import argparse

from transformers import set_seed

from ..config import parse_config
from .arguments import DataArguments, E5TrainingArguments, ModelArguments
from .trainer import E5Trainer, last_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, e.g. recipes/configs/qwen3_0_6b.yaml")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags that override the file")


def run(args: argparse.Namespace) -> None:
    types = (ModelArguments, DataArguments, E5TrainingArguments)
    model_args, data_args, training_args = parse_config(types, ["--config", args.config, *args.flags])
    set_seed(training_args.seed)
    with_eval = training_args.eval_strategy != "no"
    trainer = E5Trainer(
        model_args.load(), training_args, data_args.load_train(), data_args.load_eval() if with_eval else None
    )
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint(str(training_args.output_dir))
    )
    trainer.save_model()
    print(f"wrote {training_args.output_dir}; next: hf-e5 export {training_args.output_dir} OUT")
