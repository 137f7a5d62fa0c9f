import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import get_scheduler

from hf_e5 import E5Model, E5Trainer, E5TrainingArguments
from hf_e5.training import callbacks
from hf_e5.training.callbacks import FitToTime
from hf_e5.training.trainer import last_checkpoint
from support import lora_config


@pytest.fixture(scope="module")
def rows(sample_rows):
    columns = ("instruction", "query", "positive", "negative")
    return Dataset.from_list([{column: row.get(column) for column in columns} for row in sample_rows[:120]])


def clock(monkeypatch, durations):
    """Let each step take the next of these durations, whatever this machine does."""
    now = itertools.accumulate(itertools.chain([0.0], durations))
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(now))


def make_trainer(tiny_checkpoint, rows, tmp_path, seconds, **kwargs):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config())
    defaults = {"max_steps": 60, "warmup_steps": 5, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    args = E5TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        query_max_length=16,
        passage_max_length=16,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,
        **{**defaults, **kwargs},
    )
    return E5Trainer(model, args, train_dataset=rows, callbacks=[FitToTime(seconds)])


def learning_rates(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]


def scheduled(name, steps, warmup=5, rate=1e-3):
    """The rates of transformers' own schedule for a run of so many steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_run_is_cut_to_what_fits_and_has_the_schedule_of_a_run_of_that_length(
    tiny_checkpoint, rows, tmp_path, monkeypatch, schedule
):
    # The first step, which also loads kernels, must not count: 9 s and then 1 s a step leave 31 more of 40 s.
    clock(monkeypatch, itertools.chain([9.0], itertools.repeat(1.0)))
    trainer = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=40, lr_scheduler_type=schedule)
    trainer.train()
    assert trainer.state.global_step == 32
    assert learning_rates(trainer) == pytest.approx(scheduled(schedule, 32), abs=1e-12)


def test_steps_that_become_faster_in_the_warm_up_leave_time_for_more(tiny_checkpoint, rows, tmp_path, monkeypatch):
    # After four steps 8 more of 3 s would fit the 24 s that are left; after the fifth, 23 more of 1 s.
    clock(monkeypatch, itertools.chain([9.0, 3.0, 3.0, 1.0], itertools.repeat(1.0)))
    trainer = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=40)
    trainer.train()
    assert trainer.state.global_step == 28
    assert learning_rates(trainer) == pytest.approx(scheduled("linear", 28), abs=1e-12)


def test_max_steps_is_the_most_that_a_run_gets(tiny_checkpoint, rows, tmp_path, monkeypatch):
    clock(monkeypatch, itertools.repeat(1.0))
    trainer = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=1e6, max_steps=12)
    trainer.train()
    assert trainer.state.global_step == 12
    assert learning_rates(trainer) == pytest.approx(scheduled("linear", 12), abs=1e-12)


def test_a_run_whose_steps_become_slower_is_cut_again_and_still_ends_in_time(
    tiny_checkpoint, rows, tmp_path, monkeypatch
):
    clock(monkeypatch, itertools.chain([1.0] * 10, itertools.repeat(5.0)))
    trainer = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=50)
    trainer.train()
    assert 10 < trainer.state.global_step <= 10 + 40 / 5
    rates = learning_rates(trainer)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.2 * max(rates)


def test_some_steps_are_taken_even_where_there_is_no_time(tiny_checkpoint, rows, tmp_path, monkeypatch):
    clock(monkeypatch, itertools.repeat(100.0))
    trainer = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=1)
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_resumed_run_keeps_its_number_of_steps(tiny_checkpoint, rows, tmp_path, monkeypatch):
    clock(monkeypatch, itertools.repeat(1.0))
    whole = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=20, save_strategy="steps", save_steps=10)
    whole.train()
    assert whole.state.global_step == 20
    (tmp_path / "checkpoint-20").rename(tmp_path / "later")
    resumed = make_trainer(tiny_checkpoint, rows, tmp_path, seconds=20, save_strategy="steps", save_steps=10)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert resumed.state.global_step == 20
    assert learning_rates(resumed) == pytest.approx(scheduled("linear", 20), abs=1e-12)


def test_the_log_is_a_table_with_a_blank_where_a_batch_has_no_hard_negatives(
    tiny_checkpoint, rows, tmp_path, capsys, monkeypatch
):
    trainer = make_trainer(
        tiny_checkpoint, rows.remove_columns("negative"), tmp_path, seconds=1e6, max_steps=3, warmup_steps=1
    )
    trainer.train()
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if "runtime" not in line]
    assert head.split()[:4] == ["step", "loss", "accuracy", "positive"]
    assert [int(line.split()[0]) for line in lines] == [1, 2, 3]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for line, log in zip(lines, logs, strict=True):
        assert f"{log['loss']:.3f}" in line and "nan" not in line and math.isnan(log["hard_negative_similarity"])


def test_a_line_of_the_log_is_seen_at_once_where_a_pipe_is_written_to():
    code = (
        "import os; from types import SimpleNamespace as N; from hf_e5.training.callbacks import LogTable\n"
        "LogTable().on_log(None, N(is_world_process_zero=True, global_step=1), None, {'loss': 1.0}); os._exit(0)"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert len(result.stdout.splitlines()) == 2  # head and row, though nothing was flushed at the end
