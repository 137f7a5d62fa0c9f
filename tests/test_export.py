import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from hf_e5 import E5Model, export_sentence_transformer, verify_export
from hf_e5.cli import main
from hf_e5.errors import InputError
from hf_e5.instructions import format_query
from support import lora_config


INSTRUCTION = "Given a question, retrieve passages"
TEXTS = ["a short text", "a longer text about mountains, lakes and rivers " * 40, "", "naïve café 東京"]


def trained(tiny_checkpoint, path, pooling=None, **kwargs):
    """A checkpoint whose adapter does something, as training leaves it."""
    torch.manual_seed(1)
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config(), pooling=pooling, **kwargs)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return model


def assert_same_vectors(model, folder, atol=1e-5, **load):
    exported = SentenceTransformer(str(folder), device="cpu", **load)
    queries = exported.encode_query(TEXTS, convert_to_tensor=True).float()
    documents = exported.encode_document(TEXTS, convert_to_tensor=True).float()
    cut = {"max_length": 64}
    torch.testing.assert_close(queries, model.encode(TEXTS, instruction=INSTRUCTION, **cut), atol=atol, rtol=0)
    torch.testing.assert_close(documents, model.encode(TEXTS, **cut), atol=atol, rtol=0)
    prompted = exported.encode([format_query(t, "Another task") for t in TEXTS], convert_to_tensor=True).float()
    torch.testing.assert_close(prompted, model.encode(TEXTS, instruction="Another task", **cut), atol=atol, rtol=0)


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean", "first"])
def test_export_gives_the_trained_vectors_also_after_a_second_save(tiny_checkpoint, tmp_path, merge, pooling):
    model = trained(tiny_checkpoint, tmp_path / "checkpoint", pooling)
    out = tmp_path / "out"
    report = export_sentence_transformer(
        tmp_path / "checkpoint", out, merge=merge, instruction=INSTRUCTION, max_seq_length=64
    )
    assert report.max_difference < 1e-5
    assert (out / "adapter_model.safetensors").exists() != merge
    assert_same_vectors(model, out)
    SentenceTransformer(str(out), device="cpu").save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert_same_vectors(model, tmp_path / "again")
    assert verify_export(out).max_difference < 1e-5
    assert verify_export(out, tmp_path / "checkpoint").max_difference < 1e-5


def test_full_checkpoint_without_normalisation(tiny_checkpoint, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, normalize=False)
    model.save_pretrained(tmp_path / "checkpoint")
    export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "out", instruction=INSTRUCTION, max_seq_length=64)
    assert_same_vectors(model, tmp_path / "out", atol=1e-4)


def test_e5model_loads_an_exported_folder(tiny_checkpoint, tmp_path):
    model = trained(tiny_checkpoint, tmp_path / "checkpoint", "mean")
    with pytest.raises(InputError, match="pass instruction="):
        model.encode_query(TEXTS)
    out = tmp_path / "out"
    export_sentence_transformer(tmp_path / "checkpoint", out, merge=True, instruction=INSTRUCTION, max_seq_length=24)
    reloaded, exported = E5Model.from_pretrained(out), SentenceTransformer(str(out), device="cpu")
    assert reloaded.pooling == "mean"
    for found, expected in (
        (reloaded.encode(TEXTS), model.encode(TEXTS)),
        (reloaded.encode_query(TEXTS), exported.encode_query(TEXTS, convert_to_tensor=True)),
        (reloaded.encode_document(TEXTS), exported.encode_document(TEXTS, convert_to_tensor=True)),
        (reloaded.encode_query(TEXTS, instruction="", max_length=9), model.encode(TEXTS, max_length=9)),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_chat_template_does_not_reach_the_vectors(tiny_checkpoint, tmp_path):
    """sentence-transformers renders texts as chat turns where the tokenizer has a template."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = "{% for m in messages %}USER {{ m['content'] }}{% endfor %}"
    AutoModel.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path / "checkpoint")
    for merge in (False, True):
        out = tmp_path / f"out-{merge}"
        export_sentence_transformer(
            tmp_path / "checkpoint", out, merge=merge, instruction=INSTRUCTION, max_seq_length=64
        )
        assert_same_vectors(model, out)


def test_bf16_merge_is_close_and_stored_in_bf16(tiny_checkpoint, tmp_path):
    model = trained(tiny_checkpoint, tmp_path / "checkpoint")
    report = export_sentence_transformer(
        tmp_path / "checkpoint", tmp_path / "out", merge=True, dtype=torch.bfloat16,
        instruction=INSTRUCTION, max_seq_length=64,
    )  # fmt: skip
    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert report.max_difference < 1e-5
    assert 0.999 < report.drift.min_cosine < 1
    assert_same_vectors(model, tmp_path / "out", atol=3e-2)


def test_layout_is_the_one_older_readers_know(tiny_checkpoint, tmp_path):
    trained(tiny_checkpoint, tmp_path / "checkpoint")
    export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "out", merge=True)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"] is True and pooling["pooling_mode_mean_tokens"] is False
    prompts = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["document"] == "" and prompts["query"].endswith("\nQuery: ")
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_untrained_adapter_is_refused(tiny_checkpoint, tmp_path):
    E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config()).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(InputError, match="changes nothing"):
        export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "out", merge=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_files_are_as_readable_as_the_users_own_and_tell_nothing_of_this_machine(tiny_checkpoint, tmp_path):
    trained(tiny_checkpoint, tmp_path / "checkpoint")
    out = tmp_path / "out"
    umask = os.umask(0o027)
    try:
        export_sentence_transformer(tmp_path / "checkpoint", out, merge=True)
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [out, *out.rglob("*")]}
    assert modes["out"] == modes["1_Pooling"] == 0o750
    assert modes["model.safetensors"] == modes["config.json"] == modes["tokenizer.json"] == 0o640
    assert "use_cache" not in json.loads((out / "config.json").read_text())
    assert "local_files_only" not in json.loads((out / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 2}, "max_seq_length 2 leaves no token for text: give at least 3"),
        ({"dtype": torch.bfloat16}, "an adapter that is not merged is written as it was trained"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tiny_checkpoint, tmp_path, options, message):
    trained(tiny_checkpoint, tmp_path / "checkpoint")
    with pytest.raises(InputError, match=message):
        export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["not a checkpoint", "no such folder", "out exists", "nothing to merge"])
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(tiny_checkpoint, tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "file").write_text("kept")
    argv = {
        "not a checkpoint": ["export", str(tmp_path / "empty"), str(tmp_path / "out")],
        "no such folder": ["export", str(tmp_path / "missing"), str(tmp_path / "out")],
        "out exists": ["export", str(tiny_checkpoint), str(tmp_path / "exists")],
        "nothing to merge": ["export", str(tiny_checkpoint), str(tmp_path / "out"), "--merge"],
    }[case]
    assert main(argv) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in message if line.startswith("hf-e5 export: ")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "exists"]
    assert (tmp_path / "exists" / "file").read_text() == "kept"


def test_command(tiny_checkpoint, tmp_path, capsys):
    trained(tiny_checkpoint, tmp_path / "checkpoint")
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--merge"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fidelity \d\.\de-0[67] \(bound 1e-05\); drift .* by merging and casting to float32: ", printed)
    assert f'SentenceTransformer("{tmp_path / "out"}")' in printed
    assert main(["verify", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    assert f"{tmp_path / 'out'}: fidelity" in capsys.readouterr().out
