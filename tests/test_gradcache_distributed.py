"""Invariant 3 with two processes: DDP, ZeRO-1, 2, 3 and FSDP 2 give the gradient of one process with all rows."""

import json
import os
import subprocess
import sys

import pytest

from support import ROOT


def run(checkpoint, wrappers, precision="no"):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "support.distributed_step", str(checkpoint), wrappers, precision]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]


def assert_below(cases, limit, key="error"):
    assert {case["case"]: case[key] for case in cases if not case[key] < limit} == {}


def test_ddp(tiny_checkpoint):
    cases = run(tiny_checkpoint, "ddp")
    assert len(cases) == 8
    assert_below(cases, 1e-5)


@pytest.mark.slow
def test_every_zero_stage(tiny_checkpoint):
    cases = run(tiny_checkpoint, "1,2,3")
    assert len(cases) == 24
    assert_below(cases, 1e-5)


@pytest.mark.slow
def test_fsdp2(tiny_checkpoint):
    cases = run(tiny_checkpoint, "fsdp2")
    assert len(cases) == 8
    assert_below(cases, 1e-5)


# An error of e against the float64 gradient, in length and direction together, is a cosine of at least 1 - e^2 / 2.


@pytest.mark.slow
@pytest.mark.parametrize("wrappers", ["ddp", "1,2,3", "fsdp2"])
def test_bf16_stays_close(tiny_checkpoint, wrappers):
    """No wrapper adds to what bf16 costs by itself: no wrong scale, no gradient lost in reduction or accumulation."""
    assert_below(run(tiny_checkpoint, wrappers, "bf16"), 0.06, "overall")


@pytest.mark.slow
def test_fp16_stays_close(tiny_checkpoint):
    """Under a loss scale of 256, which DeepSpeed takes back before its step."""
    assert_below(run(tiny_checkpoint, "1,2,3", "fp16"), 0.02, "overall")
