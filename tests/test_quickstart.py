"""The quickstart from start to end, with the real SmolLM2-135M: every stage runs, and training helps."""

import re
import subprocess
import sys

import pytest

from support import ROOT, run_cli


STAGES = ["1. Dataset", "2. Training", "3. Export", "4. Comparison", "5. Search"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [42, 43, 44])
def test_the_quickstart_trains_a_better_model(tmp_path, seed):
    command = [sys.executable, "examples/quickstart.py", "--output", tmp_path, "--seed", str(seed), "--minutes", "4"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.findall(r"^=== (\d\. \w+)", run.stdout, re.MULTILINE) == STAGES
    mean = next(line for line in run.stdout.splitlines() if line.startswith("mean "))
    before, after = map(float, re.search(r"([\d.]+) +-> +([\d.]+)", mean).groups())  # nDCG@10, the first of two pairs
    assert before < after
    assert run_cli("verify", tmp_path / "model", "--checkpoint", tmp_path / "checkpoint") == 0
