"""`hf-e5 train` and the recipe script: one run, told by a file, by flags, or by both."""

import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from hf_e5 import E5TrainingArguments
from hf_e5.cli import main
from hf_e5.training.arguments import DataArguments, ModelArguments
from support import ROOT, write_jsonl


RECIPE = ROOT / "recipes" / "train_mistral.py"
SETTINGS = """
use_peft: true
lora_r: 4
dtype: float32
query_max_length: 32
passage_max_length: 32
per_device_train_batch_size: 8
max_steps: 2
learning_rate: 5e-3
warmup_steps: 1
use_cpu: true
logging_steps: 1
save_strategy: "no"
report_to: none
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_checkpoint, sample_rows):
    folder = tmp_path_factory.mktemp("config")
    rows = write_jsonl(folder / "rows.jsonl", sample_rows[:64])
    data = f"model_name_or_path: {tiny_checkpoint}\ndataset_name: {rows}\n"
    (folder / "config.yaml").write_text(data + SETTINGS, encoding="utf-8")
    return str(folder / "config.yaml")


def run_of(folder):
    """The arguments that a run was given, its number of steps, and its weights."""
    arguments = torch.load(folder / "training_args.bin", weights_only=False)
    return arguments, load_file(folder / "adapter_model.safetensors")


def test_flags_before_and_after_the_file_override_it(config, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--learning_rate", "1e-3", "--config", config, "--max-steps=3", "--output_dir", str(out)]
    assert main(["train", *flags]) == 0
    assert f"wrote {out}; next: hf-e5 export {out} OUT" in capsys.readouterr().out
    arguments, weights = run_of(out)
    assert (arguments.learning_rate, arguments.max_steps, arguments.per_device_train_batch_size) == (1e-3, 3, 8)
    assert len(weights) == 2 * 7 * 2  # two layers, seven projections, A and B


def test_the_recipe_and_the_command_train_the_same_model(config, tmp_path):
    assert main(["train", f"--config={config}", "--output_dir", str(tmp_path / "command")]) == 0
    command = [sys.executable, RECIPE, "--output_dir", str(tmp_path / "recipe"), "--config", config]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"wrote {tmp_path / 'recipe'}; next: hf-e5 export" in printed
    weights = [run_of(tmp_path / name)[1] for name in ("command", "recipe")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["train", "--help"])
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: hf-e5 train" in printed and "--config" in printed
    for arguments in (ModelArguments, DataArguments, E5TrainingArguments):
        for field in fields(arguments):
            assert f"--{field.name} " in printed or not field.init, field.name


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lerning_rate", "1"], "no option is called '--lerning_rate'; did you mean '--learning_rate'?"),
        (["--learning_rat=1"], "no option is called '--learning_rat=1'; did you mean '--learning_rate'?"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--max_steps"], "argument --max_steps/--max-steps: expected one argument"),
        (["more"], "no option is called 'more'"),
        (["--config"], "argument --config: expected one argument"),
        (["--temperature", "0"], "temperature must be above 0"),
    ],
)
def test_a_wrong_flag_is_one_line(config, capsys, flags, message):
    assert main(["train", "--config", config, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"hf-e5 train: {message}") and "\n" not in error


def test_what_neither_the_file_nor_a_flag_gives_is_named(capsys):
    assert main(["train", "--dataset_name", "rows.jsonl"]) == 2
    assert "required: --model_name_or_path" in capsys.readouterr().err
