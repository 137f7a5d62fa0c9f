import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import make_tokenizer
from hf_e5.errors import InputError
from hf_e5.modeling.tokenizer import ensure_eos, load_tokenizer, tokenize


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200), max_length=st.integers(min_value=3, max_value=40))
def test_every_text_starts_with_bos_and_ends_with_one_eos(tokenizer, text, max_length):
    text = text.replace("<s>", "").replace("</s>", "")
    (ids,) = tokenize(tokenizer, [text], max_length)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert len(ids) <= max_length
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[1:-1] == bare[: max_length - 2]


def test_eos_survives_save_and_reload(tokenizer, tmp_path):
    expected = tokenize(tokenizer, ["a long text " * 20], 16)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain(["a long text " * 20], truncation=True, max_length=16)["input_ids"] == expected
    assert plain.chat_template is None
    assert tokenize(load_tokenizer(tmp_path), ["a long text " * 20], 16) == expected


def test_ensure_eos_is_idempotent(tiny_checkpoint):
    tokenizer = ensure_eos(ensure_eos(load_tokenizer(tiny_checkpoint)))
    assert tokenize(tokenizer, ["a"], 16)[0].count(tokenizer.eos_token_id) == 1


def test_pairs_end_in_eos_too(tokenizer):
    ids = tokenizer("a", "b")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 2


def test_pad_defaults_to_eos(tiny_checkpoint):
    assert AutoTokenizer.from_pretrained(tiny_checkpoint).pad_token is None
    assert load_tokenizer(tiny_checkpoint).pad_token_id == load_tokenizer(tiny_checkpoint).eos_token_id


def test_an_encoder_tokenizer_keeps_its_own_end_token(sample_rows):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer([row["query"] for row in sample_rows[:50]])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    before = tokenizer("hello")["input_ids"]
    assert tokenize(ensure_eos(tokenizer), ["hello"], 16)[0] == before
    assert tokenizer("a")["input_ids"][-1] == 1


def test_a_tokenizer_without_eos_is_refused(sample_rows):
    tokenizer = make_tokenizer([row["query"] for row in sample_rows[:50]])
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no EOS token"):
        ensure_eos(tokenizer)


def test_a_missing_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
