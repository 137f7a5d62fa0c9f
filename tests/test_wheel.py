"""The wheel, in a folder without the repository: it holds all data files, and every command works from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_e5.cli import COMMANDS
from support import ROOT, SAMPLE, read_jsonl, write_jsonl


# What the commands read at run time, beside Python files.
DATA = {".yaml", ".jinja", ".tsv", ".txt", ".css", ".js", ".md", ".typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, as a build leaves files in the source folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes"):
        ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "-w", folder / "dist", folder / "source"], check=True)
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_every_file_that_a_command_reads(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_e5/")}
    package = [path.relative_to(ROOT / "src") for path in (ROOT / "src" / "hf_e5").rglob("*")]
    recipes = [Path("hf_e5") / path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*")]
    wanted = {path.as_posix() for path in [*package, *recipes] if path.suffix in DATA | {".py"}}
    assert wanted <= names and "hf_e5/recipes/configs/mixtures/full.yaml" in names
    assert not [name for name in names if "pycache" in name]


@pytest.mark.slow
def test_every_command_works_without_the_repository(wheel, tiny_checkpoint, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel]
    subprocess.run(install, check=True)
    write_jsonl(work / "records.jsonl", read_jsonl(SAMPLE)[:60])
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(*command, code=0):
        command = [sys.executable, "-m", "hf_e5.cli", *map(str, command)]
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]

    where = [sys.executable, "-c", "import hf_e5; print(hf_e5.__file__)"]
    assert subprocess.run(where, cwd=work, env=env, capture_output=True, text=True).stdout.startswith(str(site))
    printed = run("--help")
    for command in COMMANDS:
        assert command in printed and f"hf-e5 {command}" in run(command, "--help")
    assert "mistral_7b_full" in run("recipes")
    assert run("recipes", "full").strip() == str(site / "hf_e5/recipes/configs/mixtures/full.yaml")
    assert "507,000" in run("synthesize", "--config", "e5_500k", "--output", "run", "--dry_run")
    run("filter", ".")
    run("report", ".")
    run("build", "records.jsonl", "set")
    run("validate", "set")
    train = ["train", "--config", "smollm2_135m_cpu", "--model_name_or_path", tiny_checkpoint]
    missing = run(*train, code=2)  # the sample records are no part of the wheel
    assert "no such file" in missing and str(site / "hf_e5/examples/data/triplets.jsonl") in missing
    flags = ["--max_steps", 1, "--warmup_steps", 0, "--homogeneous_batches", "false"]
    run(*train, "--dataset_name", "records.jsonl", "--dtype", "float32", "--bf16", "false", *flags)
    run("export", "outputs/smollm2-135m-cpu", "model")
    assert (work / "model" / "modules.json").is_file()
