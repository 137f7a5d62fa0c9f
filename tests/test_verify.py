"""Verification: every right export passes at 1e-5 whatever its dtype, every corruption is refused and named."""

import json
import shutil

import corruptions
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_e5 import E5Model, export_sentence_transformer, verify_export
from hf_e5.errors import InputError
from hf_e5.export.settings import ExportSettings
from hf_e5.export.verify import Probes, max_difference
from hf_e5.modeling.tokenizer import tokenize


VECTORS = "vectors differ from that model's by"
# What the stored settings say of a changed file, and whether vectors differ, too.
NAMED = {
    "EOS missing": ("'How tall is K2.' becomes the tokens", True),
    "EOS doubled": ("becomes the tokens", True),
    "an extra BOS": ("becomes the tokens", True),
    "lower-casing": ("do_lower_case is True, not False", True),
    "max_seq_length 95 for 96": ("max_seq_length is 95, not 96", True),
    "max_seq_length 97 for 96": ("max_seq_length is 97, not 96", True),
    "chat template applied": ("chat_template is", True),
    "mean pooling": ("pooling_mode is 'mean', not 'lasttoken'", True),
    "no Normalize module": ("the list of modules is", True),
    "another query prompt": ("the prompt 'query' is 'Instruct: Please: ", True),
    "no query prompt": ("the prompt 'query' is ''", True),
    "query prompt with another space": ("the prompt 'query' is .*Query:  '", True),
    "sts_query prompt garbage": ("the prompt 'sts_query' is 'garbage'", False),
    "default_prompt_name set": ("default_prompt_name is 'query', not None", False),
    "similarity by dot product": ("similarity_fn_name is 'dot', not 'cosine'", False),
}


@pytest.fixture(scope="module", params=[True, False], ids=["merged-bfloat16", "adapter-on-bfloat16"])
def exported(request, tiny_checkpoint, tmp_path_factory):
    """(checkpoint, right export, whether it is merged)"""
    work = tmp_path_factory.mktemp("exported")
    merge, dtype = next(kind for kind in corruptions.KINDS.values() if kind[0] == request.param)
    checkpoint = corruptions.make_checkpoint(str(tiny_checkpoint), dtype, work, std=0.2)
    return checkpoint, corruptions.export(checkpoint, work / "right", merge), merge


# Where an adapter's folder has the very same files.
ONLY_MERGED = pytest.mark.parametrize("exported", [True], indirect=True, ids=["merged-bfloat16"])


def changed(right, tmp_path, file, change):
    folder = tmp_path / "changed"
    shutil.copytree(right, folder)
    corruptions.edit_json(folder / file, change)
    return folder


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_export_passes_in_every_dtype(tiny_checkpoint, tmp_path, merge, dtype):
    """Both sides compute in fp32 with the same parameters: only the order of sums differs, a few roundings of 6e-8."""
    checkpoint = corruptions.make_checkpoint(str(tiny_checkpoint), torch.float32 if merge else dtype, tmp_path, 0.2)
    out = tmp_path / "out"
    written = export_sentence_transformer(
        checkpoint, out, merge=merge, dtype=dtype if merge else None, max_seq_length=40
    )
    if merge:
        assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {dtype}
    for report in (written, verify_export(out, checkpoint), verify_export(out)):
        assert report.max_difference < 1e-5
        assert report.settings.dtype == (str(dtype).removeprefix("torch.") if merge else None)
    assert written.drift == verify_export(out, checkpoint).drift
    rounded = merge and dtype != torch.float32
    assert (written.drift.min_cosine < 1 - 1e-7) == rounded
    assert verify_export(out).drift is None


def test_a_right_bfloat16_merge_passes_although_rounding_moves_components_by_more_than_1e_2(tiny_checkpoint, tmp_path):
    base = tmp_path / "large"
    shutil.copytree(tiny_checkpoint, base)
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] = weights[name] * 8  # attention that hangs on small differences
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = corruptions.make_checkpoint(str(base), torch.float32, tmp_path, 0.2)
    report = export_sentence_transformer(checkpoint, tmp_path / "out", merge=True, dtype=torch.bfloat16)
    texts = ["How tall is K2?", "", "K2, at 8,611 metres above sea level, is the second-highest mountain on Earth."]
    as_trained, as_written = (
        E5Model.from_pretrained(path, dtype=torch.float32).encode(texts) for path in (checkpoint, tmp_path / "out")
    )
    assert (as_trained - as_written).abs().max() > 1e-2
    assert report.max_difference < 1e-5
    assert verify_export(tmp_path / "out", checkpoint).max_difference < 1e-5
    assert report.drift.min_cosine <= torch.cosine_similarity(as_trained, as_written).min() + 1e-6


@pytest.mark.parametrize("name", [*corruptions.WEIGHTS, corruptions.OTHER_BASE])
def test_other_weights_are_refused_by_their_vectors(exported, tmp_path, name):
    checkpoint, right, merge = exported
    folder = corruptions.corrupt(name, checkpoint, right, tmp_path / "corrupted", merge)
    with pytest.raises(InputError, match=VECTORS):
        verify_export(folder, checkpoint)


@ONLY_MERGED
@pytest.mark.parametrize("name", corruptions.FILES)
def test_changed_files_are_refused_by_name_and_by_their_vectors(exported, tmp_path, name):
    checkpoint, right, merge = exported
    folder = corruptions.corrupt(name, checkpoint, right, tmp_path / "corrupted", merge)
    named, differs = NAMED[name]
    with pytest.raises(InputError, match=named) as error:
        verify_export(folder, checkpoint)
    assert (VECTORS in str(error.value)) == differs
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["EOS missing", "max_seq_length 95 for 96", "mean pooling", "no query prompt"])
def test_without_a_checkpoint_the_folders_own_weights_are_run(exported, tmp_path, name):
    checkpoint, right, merge = exported
    folder = corruptions.corrupt(name, checkpoint, right, tmp_path / "corrupted", merge)
    with pytest.raises(InputError, match=VECTORS):
        verify_export(folder)


def test_stored_settings_that_were_changed_disagree_with_what_is_loaded(exported, tmp_path):
    checkpoint, right, merge = exported
    folder = changed(
        right, tmp_path, "e5_config.json", lambda c: c["export"].update(instruction="x", max_seq_length=9)
    )
    with pytest.raises(InputError, match=r"the prompt 'query' is .*max_seq_length is 96, not 9"):
        verify_export(folder, checkpoint)


@pytest.mark.parametrize(("key", "value"), [("pooling", "mean"), ("normalize", False)])
def test_pooling_and_normalisation_must_be_the_checkpoints(exported, tmp_path, key, value):
    checkpoint, right, merge = exported
    folder = changed(right, tmp_path, "e5_config.json", lambda config: config.update({key: value}))
    with pytest.raises(InputError, match=f"was exported with {key}={value}, .*checkpoint has {key}="):
        verify_export(folder, checkpoint)


@ONLY_MERGED
def test_a_merged_folder_is_not_made_from_full_weights(exported, tmp_path):
    checkpoint, right, merge = exported
    with pytest.raises(InputError, match="was not made from .*no adapter to merge"):
        verify_export(right, checkpoint.with_name("base"))
    folder = changed(right, tmp_path, "e5_config.json", lambda config: config["export"].update(merged=False))
    with pytest.raises(InputError, match="cast to bfloat16, but the checkpoint is an adapter"):
        verify_export(folder, checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("export"),
        lambda config: config["export"].pop("instruction"),
        lambda config: config["export"].update(dtype="load"),
    ],
    ids=["older version", "a name missing", "no dtype"],
)
def test_a_folder_that_does_not_say_how_it_was_exported_is_to_be_exported_again(exported, tmp_path, change):
    checkpoint, right, _ = exported
    folder = changed(right, tmp_path, "e5_config.json", change)
    with pytest.raises(InputError, match="does not say how the folder was exported .*export it again"):
        verify_export(folder, checkpoint)


def test_vectors_that_are_not_finite_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = corruptions.make_checkpoint(str(tiny_checkpoint), torch.float32, tmp_path, 0.2)
    out = corruptions.export(checkpoint, tmp_path / "out", True)
    weights = load_file(out / "model.safetensors")
    weights["norm.weight"][0] = float("nan")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"out: the vectors of 21 of 21 probes are not finite"):
        verify_export(out, checkpoint)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["norm.weight"] *= 1e6  # beyond fp16's range
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cast to float16: the vectors of 21 of 21 probes are not finite"):
        export_sentence_transformer(checkpoint, tmp_path / "half", merge=True, dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_a_folder_that_cannot_be_loaded_is_one_line(exported, tmp_path):
    checkpoint, right, _ = exported
    folder = changed(
        right, tmp_path, "config_sentence_transformers.json", lambda config: config.update(default_prompt_name="none")
    )
    with pytest.raises(InputError, match="sentence-transformers cannot load it") as error:
        verify_export(folder, checkpoint)
    assert "\n" not in str(error.value)


SETTINGS = ExportSettings("Given a question, retrieve passages", 24, True, "bfloat16", "last", True)


@pytest.mark.parametrize("max_length", [3, 24, 96])
def test_probes_hold_a_text_that_just_fits_and_one_that_is_cut(tiny_checkpoint, max_length):
    tokenizer = E5Model.from_pretrained(tiny_checkpoint).tokenizer
    settings = ExportSettings(**{**vars(SETTINGS), "max_seq_length": max_length})
    probes = Probes.of(tokenizer, settings)
    whole = tokenize(tokenizer, probes.documents, 10_000)
    assert len(whole[-2]) == max_length and probes.token_ids[-2] == whole[-2]
    assert len(whole[-1]) == max_length + 1 and len(probes.token_ids[-1]) == max_length
    assert probes.token_ids[-1][1:-1] != probes.token_ids[-2][1:-1]  # else their ranks would be left to chance
    assert len(set(probes.documents)) == len(probes.documents) and "" in probes.documents


def test_drift_counts_changed_ranks():
    """Two queries and three documents on a circle: angles in degrees, worked out by hand."""

    def at(*degrees):
        radians = torch.tensor(degrees).deg2rad()
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    probes = Probes(SETTINGS, ("q", "r"), ("a", "b", "c"), [])
    before, after = at(0.0, 90.0, 10.0, 20.0, 80.0), 3 * at(0.0, 90.0, 30.0, 20.0, 80.0)
    drift = probes.drift(before, after)
    # Query 0: a, b, c becomes b, a, c. Query 1: c, b, a becomes c, a, b. Only a moved, by 20 degrees.
    assert (drift.queries, drift.changed_tops, drift.pairs, drift.swapped_pairs) == (2, 1, 6, 2)
    assert drift.min_cosine == pytest.approx(0.9396926, abs=1e-6)
    assert drift.mean_cosine == pytest.approx((4 + 0.9396926) / 5, abs=1e-6)


def test_the_measure_does_not_depend_on_the_length_of_vectors():
    torch.manual_seed(0)
    reference = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    vectors = reference + 1e-3 * torch.randn(5, 8)
    expected = (vectors - reference).abs().max().item()
    assert max_difference(vectors, reference) == pytest.approx(expected, rel=1e-5)
    assert max_difference(40 * vectors, 40 * reference) == pytest.approx(expected, rel=1e-5)
    assert max_difference(vectors[:, :4], reference) == float("inf")


def test_a_model_without_normalisation_is_held_to_the_same_bound(tiny_checkpoint, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, normalize=False)
    model.save_pretrained(tmp_path / "checkpoint")
    out = tmp_path / "out"
    assert export_sentence_transformer(tmp_path / "checkpoint", out, dtype=torch.bfloat16).max_difference < 1e-5
    module = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
    corruptions.edit_json(out / "modules.json", lambda modules: modules.append(module))
    (out / "2_Normalize").mkdir()
    with pytest.raises(InputError, match=f"the list of modules is .*{VECTORS}"):
        verify_export(out, tmp_path / "checkpoint")
    assert json.loads((out / "e5_config.json").read_text())["normalize"] is False
