"""Shipped recipes by name, and paths in a YAML file, which are relative to that file."""

from collections import Counter

import pytest
import yaml

from hf_e5 import E5TrainingArguments
from hf_e5.config import beside, parse_config
from hf_e5.data.mixture import load_mixture
from hf_e5.data.mixture_config import read_mixture
from hf_e5.errors import InputError
from hf_e5.shipped_recipes import list_recipes
from hf_e5.synthesis.config import load_config
from hf_e5.training.arguments import DataArguments, ModelArguments
from support import ROOT, run_cli, write_jsonl


FOLDER = ROOT / "recipes"
TYPES = (ModelArguments, DataArguments, E5TrainingArguments)


def test_every_yaml_is_listed_under_a_name_of_its_own(capsys):
    assert {recipe.path for recipe in list_recipes()} == set(FOLDER.resolve().rglob("*.yaml"))
    assert max(Counter(recipe.name for recipe in list_recipes()).values()) == 1
    assert run_cli("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list_recipes())
    for recipe, line in zip(list_recipes(), lines, strict=True):
        assert line.split()[:2] == [recipe.kind, recipe.name]
        first = recipe.path.read_text(encoding="utf-8").splitlines()[0]
        assert line.endswith(first[2:]) and first.startswith("# ") and first.endswith((".", "quickstart."))


def test_a_name_stands_for_the_file_wherever_one_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--bf16", "false", "--use_cpu"]
    model, data, training = parse_config(TYPES, ["--config", "mistral_7b_full", *flags])
    assert model.model_name_or_path == "mistralai/Mistral-7B-v0.1" and training.output_dir == "outputs/mistral-7b-full"
    assert data.dataset_name == str((FOLDER / "configs/mixtures/full.yaml").resolve())
    assert load_config("quick").num_examples == 300
    assert run_cli("recipes", "zero3") == 0
    assert capsys.readouterr().out.strip() == str((FOLDER / "accelerate_configs/zero3.yaml").resolve())
    # A file of that name comes first; a recipe of another kind is none.
    (tmp_path / "quick").write_text("num_examples: 7")
    assert load_config("quick").num_examples == 7
    with pytest.raises(InputError, match="no shipped training recipe"):
        parse_config(TYPES, ["--config", "e5_500k"])
    with pytest.raises(InputError, match="did you mean 'mistral_7b_full'"):
        parse_config(TYPES, ["--config", "mistral_7b_ful"])
    assert run_cli("recipes", "--copy", "x") == run_cli("recipes", "nothing") == 2


def test_a_copy_can_be_edited_and_trained_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli("recipes", "mistral_7b_full", "--copy", "recipes") == 0
    assert run_cli("recipes", "own_task_type", "--copy", "recipes") == 0
    copied = {path.relative_to(tmp_path / "recipes").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert copied == {
        "configs/mistral_7b_full.yaml",
        "configs/mixtures/full.yaml",
        "synthesis/own_task_type.yaml",
        "synthesis/templates/code_review.jinja",
    }
    assert all((tmp_path / "recipes" / name).read_bytes() == (FOLDER / name).read_bytes() for name in copied)
    flags = ["--bf16", "false", "--use_cpu"]
    _, data, _ = parse_config(TYPES, ["--config", "recipes/configs/mistral_7b_full.yaml", *flags])
    assert data.dataset_name == str(tmp_path / "recipes/configs/mixtures/full.yaml")
    (tmp_path / "data" / "synthetic").mkdir(parents=True)
    assert read_mixture(data.dataset_name)[0][0].path == str(tmp_path / "data" / "synthetic")
    assert run_cli("recipes", "mistral_7b_full", "--copy", "recipes") == 2
    assert "mistral_7b_full.yaml: exists" in capsys.readouterr().err


def test_paths_in_a_file_are_relative_to_it_and_flags_to_the_working_directory(tmp_path, monkeypatch, sample_rows):
    there, here = tmp_path / "there", tmp_path / "here"
    for number, folder in enumerate((there, here), 1):
        folder.mkdir()
        write_jsonl(folder / "rows.jsonl", sample_rows[:number])
    monkeypatch.chdir(here)
    values = {"model_name_or_path": "user/model", "dataset_name": "rows.jsonl", "output_dir": "out", "use_cpu": True}
    (there / "config.yaml").write_text(yaml.safe_dump(values))
    model, data, training = parse_config(TYPES, ["--config", "../there/config.yaml"])
    assert len(data.load_train()) == 1
    assert (model.model_name_or_path, training.output_dir) == ("user/model", "out")
    data = parse_config(TYPES, ["--config", "../there/config.yaml", "--dataset_name", "rows.jsonl"])[1]
    assert len(data.load_train()) == 2
    (there / "user" / "model").mkdir(parents=True)
    model = parse_config(TYPES, ["--config", "../there/config.yaml"])[0]
    assert model.model_name_or_path == str(there / "user" / "model")

    (there / "mixture.yaml").write_text("datasets: [{path: rows.jsonl}]")
    assert len(load_mixture("../there/mixture.yaml")) == 1
    (there / "mixture.yaml").write_text("datasets: [{path: ../gone.jsonl}]")
    with pytest.raises(InputError, match=f"no such file: {tmp_path / 'gone.jsonl'}"):
        load_mixture("../there/mixture.yaml")
    with pytest.raises(InputError, match=f"{here / 'gone.yaml'}: No such file"):
        load_mixture("gone.yaml")
    with pytest.raises(InputError, match=f"{here / 'gone.yaml'}: No such file"):
        parse_config(TYPES, ["--config", "gone.yaml"])


@pytest.mark.parametrize(
    "value", ["user/name", "name", "user/name-v0.1", "hf://datasets/u/n/*.parquet", "/abs/a.jsonl"]
)
def test_what_is_no_relative_path_stays_as_it_is(tmp_path, value):
    assert beside(tmp_path / "file.yaml", value) == value


@pytest.mark.parametrize(
    "value", ["rows.jsonl", "a/rows.jsonl.gz", "../name", "./name", "a/b/c", "part-*.parquet", "a/"]
)
def test_what_can_be_no_hub_id_is_a_path(tmp_path, value):
    assert beside(tmp_path / "file.yaml", value) == str((tmp_path / value).resolve())
