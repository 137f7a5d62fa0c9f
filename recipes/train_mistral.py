"""Fine-tune a decoder LLM into a text-embedding model (the E5-mistral recipe).

    accelerate launch recipes/train_mistral.py --config recipes/configs/smollm2_135m_cpu.yaml
    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \
        recipes/train_mistral.py --config recipes/configs/mistral_7b_full.yaml

Any flag before or after the config overrides it. Run again after a stop, it goes on from the last complete checkpoint
in output_dir.
"""

from hf_e5.environment import prepare_process


prepare_process()  # before anything imports torch

import sys

from hf_e5.config import parse_config
from hf_e5.errors import InputError
from hf_e5.training.arguments import DataArguments, E5TrainingArguments, ModelArguments
from hf_e5.training.run import train


def main() -> None:
    model_args, data_args, training_args = parse_config((ModelArguments, DataArguments, E5TrainingArguments))
    trainer = train(model_args, data_args, training_args)  # set the seed, load, train or resume, save
    if trainer.is_world_process_zero():
        print(f"wrote {training_args.output_dir}; next: hf-e5 export {training_args.output_dir} OUT")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train_mistral.py: {error}", file=sys.stderr)
        sys.exit(2)
