"""Fine-tune a decoder LLM into a text-embedding model (the E5-mistral recipe).

    accelerate launch recipes/train_mistral.py --config recipes/configs/smollm2_135m_cpu.yaml
    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \
        recipes/train_mistral.py --config recipes/configs/mistral_7b_full.yaml

Any flag after the config overrides it. Run again after a stop, it goes on from the last complete checkpoint in
output_dir.
"""

import sys

from transformers import set_seed

from hf_e5 import E5Trainer
from hf_e5.config import parse_config
from hf_e5.errors import InputError
from hf_e5.training.arguments import DataArguments, E5TrainingArguments, ModelArguments
from hf_e5.training.trainer import last_checkpoint


def main(model_args: ModelArguments, data_args: DataArguments, training_args: E5TrainingArguments) -> None:
    set_seed(training_args.seed)
    model = model_args.load()
    train_dataset = data_args.load_train()
    eval_dataset = data_args.load_eval() if training_args.eval_strategy != "no" else None

    trainer = E5Trainer(model, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir)
    )
    trainer.save_model()

    if trainer.is_world_process_zero():
        print(f"wrote {training_args.output_dir}; next: hf-e5 export {training_args.output_dir} OUT")


if __name__ == "__main__":
    try:
        main(*parse_config((ModelArguments, DataArguments, E5TrainingArguments)))
    except InputError as error:
        print(f"train_mistral.py: {error}", file=sys.stderr)
        sys.exit(2)
