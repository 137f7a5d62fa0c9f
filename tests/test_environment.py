import os
import subprocess
import sys

import pytest
import torch

from hf_e5 import environment


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "busy_cores, variables, policy",
    [
        (0.0, {}, None),
        (1.0, {}, "PASSIVE"),
        (0.0, {"LOCAL_WORLD_SIZE": "2"}, "PASSIVE"),
        (1.0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (1.0, {"GOMP_SPINCOUNT": "100"}, None),
    ],
    ids=["idle", "beside others", "several processes", "the user's policy stays", "the user's spin count stays"],
)
def test_threads_sleep_while_they_wait_where_cores_are_shared(monkeypatch, busy_cores, variables, policy):
    monkeypatch.setattr(environment, "_cores_used_by_others", lambda: busy_cores)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.prepare_process()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_a_busy_process_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        busy = environment._cores_used_by_others(1.0)
        neighbour.kill()
    # A core less what the system takes from it; half of it where this machine is full.
    assert busy > environment.BUSY_CORES


def test_the_command_line_prepares_its_process_before_torch_is_there():
    code = (
        "import sys; from hf_e5 import cli, environment\n"
        "cli.prepare_process = lambda: print('torch' in sys.modules)\n"
        "cli.main(['verify', '/nowhere'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_dtype_is_the_one_measured_fastest(monkeypatch, dtype):
    """A clock that charges the other dtype ten times as much."""
    now = 0.0
    product = torch.Tensor.__matmul__

    def matmul(left, right):
        nonlocal now
        now += 1.0 if left.dtype == dtype else 10.0
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(environment.time, "perf_counter", lambda: now)
    assert environment.fastest_dtype() == dtype
