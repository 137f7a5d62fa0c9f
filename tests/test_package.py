import subprocess
import sys

import pytest

import hf_e5
from hf_e5.cli import COMMANDS, main


HEAVY = ("torch", "transformers", "datasets", "openai", "deepspeed", "mteb", "matplotlib")


def test_import_loads_nothing_heavy():
    code = f"import sys, hf_e5, hf_e5.cli; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves():
    for name in hf_e5.__all__:
        assert getattr(hf_e5, name).__name__ == name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-e5 {command}" in capsys.readouterr().out
