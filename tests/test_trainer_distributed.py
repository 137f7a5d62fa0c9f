"""The trainer under the shipped accelerate configurations, with two processes: train, save, reload, resume."""

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_e5 import E5Model
from support import ROOT, write_jsonl
from support.distributed_training import train
from support.step_reference import relative_error


CONFIGS = ROOT / "recipes" / "accelerate_configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory, sample_rows):
    return str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", sample_rows[:100]))


@pytest.fixture(scope="module", params=["lora", "full"])
def one_process(request, tiny_checkpoint, data, tmp_path_factory):
    trainer = train(tiny_checkpoint, Dataset.from_json(data), tmp_path_factory.mktemp("one"), request.param, "float32")
    weights = {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}
    return request.param, weights


def launch(config, *arguments, precision):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", precision]
    command += ["-m", "support.distributed_training", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr[-3000:]


def saved_weights(folder):
    return dict(E5Model.from_pretrained(folder, dtype="auto").named_parameters())


def assert_saved_and_resumed(folder):
    """Reloaded and resumed weights are the trained ones, in the precision of the file; and training moved them."""
    trained, resumed = load_file(folder / "trained.safetensors"), load_file(folder / "resumed.safetensors")
    first, second = (saved_weights(folder / "run" / f"checkpoint-{step}") for step in (1, 2))
    assert trained.keys() == resumed.keys()
    for name, value in trained.items():
        for other in (second[name], resumed[name]):
            torch.testing.assert_close(other, value.to(other.dtype), atol=0, rtol=0)
    assert any((value.to(first[name].dtype) != first[name]).any() for name, value in trained.items())
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_two_processes_equal_one_and_resume(tiny_checkpoint, data, one_process, tmp_path, config):
    kind, expected = one_process
    launch(config, tiny_checkpoint, data, tmp_path, kind, "float32", precision="no")
    assert relative_error(assert_saved_and_resumed(tmp_path), expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, kind", [("zero2", "lora"), ("zero2", "full"), ("zero3", "lora"), ("zero3", "full"), ("fsdp2", "lora")]
)
def test_bf16(tiny_checkpoint, data, tmp_path, config, kind):
    launch(config, tiny_checkpoint, data, tmp_path, kind, "bfloat16", precision="bf16")
    assert_saved_and_resumed(tmp_path)
