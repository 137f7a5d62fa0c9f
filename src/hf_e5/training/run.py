"""One training run from start to end: what `hf-e5 train` and `recipes/train_mistral.py` do."""

from __future__ import annotations

from transformers import set_seed

from .arguments import DataArguments, E5TrainingArguments, ModelArguments
from .trainer import E5Trainer, last_checkpoint


def train(model_args: ModelArguments, data_args: DataArguments, training_args: E5TrainingArguments) -> E5Trainer:
    """Load data and model, train, and save the model to `training_args.output_dir`.

    A run that was stopped goes on from the last complete checkpoint in `output_dir`.

    Raises:
        InputError: The data or the model cannot be loaded, or do not fit the arguments.
    """
    set_seed(training_args.seed)
    train_dataset = data_args.load_train()
    eval_dataset = data_args.load_eval() if training_args.eval_strategy != "no" else None
    model = model_args.load()

    trainer = E5Trainer(model, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint(str(training_args.output_dir))
    )
    trainer.save_model()
    return trainer
