import ast
import subprocess
import sys
from pathlib import Path

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


def test_type_checkers_see_the_public_names():
    source = ast.parse(Path(hf_e5.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == hf_e5._MODULES


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-e5 {command}" in capsys.readouterr().out


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    for module in [name for name in sys.modules if name.startswith(("hf_e5.synthesis", "hf_e5.commands.synth"))]:
        monkeypatch.delitem(sys.modules, module)
    assert main(["synthesize", "--help"]) == 2
    assert capsys.readouterr().err == ("hf-e5 synthesize: openai is not installed: pip install 'hf-e5[synthesis]'\n")


def test_a_value_that_transformers_refuses_is_one_line(tiny_checkpoint, capsys):
    flags = ["--model_name_or_path", str(tiny_checkpoint), "--dataset_name", "rows.jsonl", "--optim", "adamm"]
    assert main(["train", *flags]) == 2
    assert "adamm" in capsys.readouterr().err.splitlines()[-1]
