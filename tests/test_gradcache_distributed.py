"""Invariant 3 with two processes: DDP and DeepSpeed ZeRO-1, 2, 3 give the gradient of one process with all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(checkpoint, stages):
    script = Path(__file__).parent / "distributed_step.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), str(checkpoint), stages]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]


def test_ddp(tiny_checkpoint):
    cases = run(tiny_checkpoint, "ddp")
    assert len(cases) == 8
    assert {case["case"]: case["error"] for case in cases if not case["error"] < 1e-5} == {}


@pytest.mark.slow
def test_every_zero_stage(tiny_checkpoint):
    cases = run(tiny_checkpoint, "1,2,3")
    assert len(cases) == 24
    assert {case["case"]: case["error"] for case in cases if not case["error"] < 1e-5} == {}
