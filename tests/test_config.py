import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from hf_e5 import E5TrainingArguments
from hf_e5.config import add_fields, parse_config
from hf_e5.errors import InputError
from hf_e5.training.arguments import DataArguments, ModelArguments


RECIPES = Path(__file__).parent.parent / "recipes" / "configs"


@dataclass
class Model:
    name: str = field(metadata={"help": "required"})
    rank: int = 16


@dataclass
class Run:
    rate: float = 0.1
    fast: bool = False
    parts: list[str] | None = None


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_override_the_file(tmp_path):
    config = write(tmp_path, "name: a\nrank: 8\nrate: 1e-4\nfast: true\nparts: [x, y]\n")
    assert parse_config((Model, Run), ["--config", config]) == (Model("a", 8), Run(1e-4, True, ["x", "y"]))
    model, run = parse_config((Model, Run), ["--rank", "4", "--config", config, "--fast", "false"])
    assert (model.name, model.rank, run.fast) == ("a", 4, False)
    assert parse_config((Model, Run), ["--name", "b"]) == (Model("b"), Run())


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: a\nrnak: 8\n", r"no option is called 'rnak'; did you mean 'rank'\?"),
        ("- a\n", "expected `name: value` lines, found list"),
        ("name: [a\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    config = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        parse_config((Model, Run), ["--config", config])
    assert config in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_unknown_flag(tmp_path):
    with pytest.raises(InputError, match="nowhere.yaml"):
        parse_config((Model, Run), ["--config", "nowhere.yaml"])
    with pytest.raises(InputError, match="--speed"):
        parse_config((Model, Run), ["--name", "a", "--speed", "3"])


@dataclass
class Flags:
    count: int = field(default=3, metadata={"help": "95 % of all"})
    limit: float | None = field(default=None, metadata={"help": "none by default"})
    mode: Literal["random", "top"] = field(default="random", metadata={"help": "one of two"})
    fast: bool = field(default=False, metadata={"help": "a switch"})
    unnamed: int = 7


def test_fields_become_flags_with_types_choices_and_defaults():
    parser = argparse.ArgumentParser()
    add_fields(parser, Flags)
    add_fields(parser.add_argument_group("required"), Model)
    parsed = vars(parser.parse_args(["--name", "a"]))
    assert parsed == {"count": 3, "limit": None, "mode": "random", "fast": False, "name": "a"}
    parsed = parser.parse_args(["--name", "a", "--count", "4", "--limit", "0.5", "--mode", "top", "--fast"])
    assert (parsed.count, parsed.limit, parsed.mode, parsed.fast) == (4, 0.5, "top", True)
    assert "95 % of all (default: 3)" in parser.format_help()
    for wrong in (["--mode", "hard"], ["--count", "x"], []):
        with pytest.raises(SystemExit):
            parser.parse_args(["--name", "a", *wrong] if wrong else [])


@pytest.mark.parametrize("name", ["mistral_7b_synthetic", "mistral_7b_synthetic_msmarco", "mistral_7b_full"])
def test_mistral_recipes_are_the_papers(name):
    """Hyper-parameters of section 4.2, appendix A and the released adapter's configuration."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    paper = {
        "model_name_or_path": "mistralai/Mistral-7B-v0.1",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "num_train_epochs": 1,
        "query_max_length": 512,
        "passage_max_length": 512,
        "temperature": 0.02,
    }
    assert {key: values[key] for key in paper} == paper
    assert values["per_device_train_batch_size"] * 32 == 2048  # on the paper's 32 GPUs
    fields = E5TrainingArguments.__dataclass_fields__
    defaults = {key: fields[key].default for key in paper if key in fields}
    assert defaults == {key: paper[key] for key in defaults}


def test_every_recipe_parses():
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        flags = ["--bf16", "false", "--use_cpu"] if recipe.name != "smollm2_135m_cpu.yaml" else []
        model, data, run = parse_config(
            (ModelArguments, DataArguments, E5TrainingArguments), ["--config", str(recipe), *flags]
        )
        assert model.peft_config().r == 16
        assert run.output_dir.startswith("outputs/")
