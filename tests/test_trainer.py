import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers.util import cos_sim
from transformers import AutoConfig, AutoModelForCausalLM

from hf_e5 import E5Model, E5Trainer, E5TrainingArguments
from hf_e5.config import parse_config
from hf_e5.errors import InputError
from hf_e5.instructions import format_query
from hf_e5.training.arguments import ModelArguments


ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "train_mistral.py")


def lora(dropout=0.1):
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
    )


def arguments(output_dir, **kwargs):
    defaults = {
        "per_device_train_batch_size": 16,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
        "logging_steps": 1,
        "query_max_length": 48,
        "passage_max_length": 48,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return E5TrainingArguments(output_dir=str(output_dir), **{**defaults, **kwargs})


@pytest.fixture(scope="module")
def rows(sample_rows):
    columns = ("instruction", "query", "positive", "negative")
    return Dataset.from_list([{column: row.get(column) for column in columns} for row in sample_rows[:200]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_lowers_the_loss_and_saves_an_adapter(tiny_checkpoint, rows, tmp_path, dtype):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora(), dtype=dtype)
    args = arguments(tmp_path, max_steps=24, bf16=dtype == torch.bfloat16)
    trainer = E5Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_ndcg_at_10"] > before["eval_ndcg_at_10"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 24
    for name in ("accuracy", "positive_similarity", "negative_similarity", "num_negatives", "tokens_per_second"):
        assert all(name in log for log in logs), name
    trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    reloaded = E5Model.from_pretrained(tmp_path, dtype=dtype)
    # In bf16 the trained model runs under the accelerator's autocast, the reloaded one does not.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(reloaded.encode(["a text"]), model.encode(["a text"]), atol=tolerance, rtol=0)


def test_evaluation_against_a_plain_ranking(tiny_checkpoint, rows, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint)
    part = rows.select(range(40))
    metrics = E5Trainer(model, arguments(tmp_path), eval_dataset=part).evaluate()
    cut = {"max_length": 48}
    queries = torch.stack(
        [model.encode(format_query(row["query"], row["instruction"]), **cut) for row in part]
    ).double()
    corpus = list(dict.fromkeys(t for row in part for t in (row["positive"], row["negative"]) if t))
    documents = model.encode(corpus, **cut).double()
    scores = cos_sim(queries, documents)
    targets = torch.tensor([corpus.index(row["positive"]) for row in part])
    ranks = (scores > scores.gather(1, targets[:, None])).sum(1) + 1
    expected = {
        "eval_loss": torch.nn.functional.cross_entropy(scores / 0.02, targets).item(),
        "eval_accuracy": (ranks == 1).double().mean().item(),
        "eval_mrr": (1 / ranks.double()).mean().item(),
        "eval_ndcg_at_10": torch.where(ranks <= 10, 1 / torch.log2(ranks + 1.0), 0).mean().item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_full_fine_tuning_with_checkpointing_and_accumulation(tiny_checkpoint, rows, tmp_path, caplog):
    model = E5Model.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    args = arguments(
        tmp_path, max_steps=2, learning_rate=1e-3, gradient_checkpointing=True, gradient_accumulation_steps=2
    )
    assert "adds no negatives" in caplog.text
    E5Trainer(model, args, train_dataset=rows).train()
    assert all((p != before[name]).any() for name, p in model.named_parameters())


def test_accumulation_averages_the_batches(tiny_checkpoint, rows, tmp_path):
    """Two accumulated batches give the mean of their gradients (SGD without momentum shows it in the weights)."""
    results = []
    for accumulation in (1, 2):
        model = E5Model.from_pretrained(tiny_checkpoint, dtype=torch.float32)
        first, second = rows.select(range(16)), rows.select(range(16, 32))
        args = arguments(
            tmp_path, max_steps=1, optim="sgd", weight_decay=0, warmup_steps=0, learning_rate=1.0, max_grad_norm=0,
            gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
        )  # fmt: skip
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        updates = []
        if accumulation == 2:
            E5Trainer(model, args, train_dataset=rows.select(range(32))).train()
            updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
        else:
            for part in (first, second):
                model = E5Model.from_pretrained(tiny_checkpoint, dtype=torch.float32)
                E5Trainer(model, args, train_dataset=part).train()
                updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
        results.append(torch.stack(updates).mean(0))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)


def test_an_adapter_without_gradients_fails_loudly(tiny_checkpoint, rows, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora(0.0))
    layer = model.backbone.base_model.model.layers[1].mlp.down_proj
    layer.scaling["default"] = 0.0  # this pair's output, and so its gradient, is zero
    with pytest.raises(RuntimeError, match=r"1 of 28 LoRA tensors got no gradient.*layers\.1\.mlp\.down_proj"):
        E5Trainer(model, arguments(tmp_path), train_dataset=rows).train()


def test_the_card_names_the_model_it_started_from(tiny_checkpoint, rows, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora())
    trainer = E5Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows)
    trainer.train()
    trainer.create_model_card(finetuned_from="user/base")
    card = (tmp_path / "README.md").read_text()
    assert "fine-tuned version of [user/base]" in card and "hf-e5" in card


def test_too_few_rows(tiny_checkpoint, rows, tmp_path):
    with pytest.raises(InputError, match="5 rows, a global batch needs 16"):
        E5Trainer(E5Model.from_pretrained(tiny_checkpoint), arguments(tmp_path), train_dataset=rows.select(range(5)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0}, "temperature must be above 0"),
        ({"query_max_length": 2}, "query_max_length"),
        ({"keep_graph_num_tokens": "many"}, "keep_graph_num_tokens must be a number or auto"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize("value", ["300", "auto"])
def test_kept_tokens_from_a_flag_and_from_yaml(tmp_path, value):
    (tmp_path / "config.yaml").write_text(f"output_dir: x\nkeep_graph_num_tokens: {value}\n")
    for flags in (["--output_dir", "x", "--keep_graph_num_tokens", value], ["--config", f"{tmp_path}/config.yaml"]):
        (args,) = parse_config((E5TrainingArguments,), flags)
        assert args.kept_tokens() == ("auto" if value == "auto" else 300)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_lora_adapts_all_seven_linear_layers(tmp_path, tiny_checkpoint, model_type):
    """The paper's adapter. Three layers, as in a real model: in smaller ones peft spells out every layer."""
    config = AutoConfig.for_model(
        model_type, vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    E5Model.from_pretrained(tiny_checkpoint).tokenizer.save_pretrained(tmp_path)
    model = ModelArguments(str(tmp_path), use_peft=True).load()
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.backbone.peft_config["default"].target_modules == names
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 3 * 7


@pytest.mark.parametrize("value, count", [("q_proj", 2), ("[q_proj, v_proj]", 4), ("[all-linear]", 14)])
def test_lora_targets_from_yaml(tmp_path, tiny_checkpoint, value, count):
    path = tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: {tiny_checkpoint}\nuse_peft: true\nlora_target_modules: {value}\n")
    (args,) = parse_config((ModelArguments,), ["--config", str(path)])
    assert len([name for name, _ in args.load().named_parameters() if "lora_A" in name]) == count


def test_lora_targets_that_are_not_there(tiny_checkpoint):
    with pytest.raises(InputError, match="cannot put an adapter on .*c_attn.* not found") as error:
        ModelArguments(str(tiny_checkpoint), use_peft=True, lora_target_modules=["c_attn"]).load()
    assert "\n" not in str(error.value)


def test_best_model_is_loaded_at_the_end(tiny_checkpoint, rows, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora())
    args = arguments(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = E5Trainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(50)))
    trainer.train()
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)


# The recipe, as a user runs it


def recipe_command(checkpoint, data, output_dir, *flags):
    return [
        RECIPE, "--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--output_dir", str(output_dir),
        "--use_peft", "--lora_r", "4", "--dtype", "float32", "--query_max_length", "48", "--passage_max_length", "48",
        "--max_steps", "12", "--learning_rate", "5e-3", "--warmup_steps", "2", "--use_cpu", "--logging_steps", "1",
        "--save_steps", "3", "--seed", "7", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory, sample_rows):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sample_rows), encoding="utf-8")
    return path


def run(*command, **kwargs):
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, **kwargs)


def weights(output_dir):
    return load_file(Path(output_dir) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    run(*recipe_command(tiny_checkpoint, data, output_dir, "--per_device_train_batch_size", "16"))
    return output_dir


KILLED_AFTER_STEP_7 = """
import os, runpy, signal, sys
from transformers import TrainerCallback, trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

trainer.DEFAULT_CALLBACKS.append(Kill)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_resumes_to_the_same_weights(tiny_checkpoint, data, uninterrupted, tmp_path):
    command = recipe_command(tiny_checkpoint, data, tmp_path, "--per_device_train_batch_size", "16")
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_STEP_7, *command], stderr=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "checkpoint-6").exists()
    (tmp_path / "checkpoint-9").mkdir()  # as if killed again, while saving
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{")
    run(*command)
    expected, resumed = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, atol=0, rtol=0)


def test_two_processes_equal_one_with_the_same_global_batch(tiny_checkpoint, data, tmp_path):
    """DDP over gloo with cross-device negatives; dropout off, as each process draws its own."""
    flags = ["--lora_dropout", "0", "--save_strategy", "no"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*recipe_command(tiny_checkpoint, data, one, *flags, "--per_device_train_batch_size", "16"))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d",
              "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    run(*launch, *recipe_command(tiny_checkpoint, data, two, *flags, "--per_device_train_batch_size", "8"))
    expected, distributed = weights(one), weights(two)
    for name, value in expected.items():
        torch.testing.assert_close(distributed[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "no/such-model"], "no/such-model"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_checkpoint, data, tmp_path, flags, message):
    command = recipe_command(tiny_checkpoint, data, tmp_path / "out", *flags)
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train_mistral.py: ") and message in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
