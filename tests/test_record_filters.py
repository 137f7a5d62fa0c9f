import json
from pathlib import Path

import pytest

from hf_e5.filters.contamination import TestSets
from hf_e5.filters.language_id import detect_other_language
from hf_e5.filters.record_filters import FILTERS, FilterSettings, LengthLimits, judge
from hf_e5.languages import load_languages


SAMPLE = Path(__file__).parent.parent / "examples" / "data" / "triplets.jsonl"
RECORD = {
    "id": "1",
    "task_type": "short_long",
    "language": "en",
    "document_language": "en",
    "instruction": "Given a question about mountains, retrieve a passage that answers it.",
    "query": "how tall is the second highest mountain of the world",
    "positive": "K2 rises to 8,611 metres on the border of China and Pakistan, some 237 metres less than Everest.",
    "negative": "Everest, on the border of China and Nepal, rises to 8,849 metres and was first climbed in 1953.",
    "placeholders": {"num_words": "50"},
    "model": "m",
}
GERMAN = "Der zweithöchste Berg der Erde liegt im Karakorum und wurde im Jahr 1954 zum ersten Mal bestiegen."
LABEL = {"task_type": "long_short", "query": "The room was cold and nobody answered the phone.", "negative": "praise"}
LEAK = TestSets([("trec", RECORD["positive"].upper())])


def verdict(settings=None, **changes):
    record = {name: value for name, value in {**RECORD, **changes}.items() if value is not ...}
    found = judge(record, settings or FilterSettings())
    return found and found[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative": None},
        {"negative": ...},
        {"placeholders": {}},
        {"placeholders": {"num_words": 50}},
        {"task_type": "my_own", "query": "x", "positive": "y", "negative": "z"},
        # a short query may be the topic of its document
        {"query": "K2"},
        # a label inside a longer word is no hint; here neither is "no" of "nobody" nor "old" of "cold"
        {**LABEL, "positive": "old"},
        # the misleading label may stand in the text
        {**LABEL, "positive": "complaint", "negative": "cold"},
        {**LABEL, "language": "hi", "document_language": "hi", "query": "यह किताब बहुत अच्छी है", "positive": "किता"},
        # texts about AI and about documents are not talk of the model about its answer
        {"positive": "An AI language model predicts the next word, and I can not say that it understands any of it."},
        {"positive": "The court found that this document is relevant and that the witness could be heard on it."},
        # too short to tell the language
        {"query": "expressio unius est exclusio alterius"},
        {"language": "xx", "document_language": "xx"},
        # code is in no language
        {
            "document_language": "de",
            "negative": None,
            "positive": "def height(name):\n    return TABLE[name].metres  # look it up\n" * 3,
        },
    ],
)
def test_good_records_pass(changes):
    assert verdict(**changes) is None


@pytest.mark.parametrize(
    "name, changes",
    [
        ("schema", {"query": ...}),
        ("schema", {"positive": None}),
        ("schema", {"negative": ["a"]}),
        ("schema", {"placeholders": "x"}),
        ("schema", {"model": 4}),
        ("schema", {"query": "half a pair \ud83d"}),
        ("schema", {"placeholders": {"domain": "half a pair \ud83d"}}),
        ("schema", {"query": " \n"}),
        ("schema", {"negative": ""}),
        ("schema", {"language": "German"}),
        ("schema", {"task_type": "all"}),
        ("empty", {"query": "-"}),
        ("empty", {"positive": "...!"}),
        ("empty", {"negative": "?"}),
        ("empty", {"instruction": "..."}),
        ("length", {"positive": "Too short."}),
        ("length", {"query": "a" * 1001}),
        ("length", {**LABEL, "positive": "x" * 201}),
        ("length", {"task_type": "my_own", "positive": "x" * 20_001}),
        ("copied_query", {"query": RECORD["positive"].upper()}),
        ("copied_query", {"query": RECORD["negative"]}),
        ("copied_query", {"query": "on the border of China and Pakistan, some 237 metres"}),
        ("positive_equals_negative", {"negative": "  " + RECORD["positive"].lower()}),
        ("label_in_text", {**LABEL, "positive": "Cold"}),
        ("label_in_text", {**LABEL, "language": "zh", "query": "这家餐厅的服务态度很差。", "positive": "服务"}),
        ("meta_talk", {"query": "As an AI language model, I cannot say how tall it is."}),
        ("meta_talk", {"positive": "This document is relevant because it names K2. " + RECORD["positive"]}),
        ("meta_talk", {"negative": "Sure! Here is a passage about Everest: " + RECORD["negative"]}),
        ("meta_talk", {"positive": RECORD["positive"] + " {num_words}"}),
        ("meta_talk", {"positive": "作为一个人工智能语言模型，我无法回答这个问题。" * 4, "document_language": "zh"}),
        ("wrong_language", {"positive": GERMAN}),
        ("wrong_language", {"language": "de"}),
        ("wrong_language", {"document_language": "ja"}),
    ],
)
def test_each_filter_drops_what_it_is_for(name, changes):
    assert verdict(**changes) == name


def test_contamination_needs_test_sets_and_leaves_short_texts():
    assert verdict(FilterSettings(test_sets=LEAK)) == "contamination"
    assert verdict(FilterSettings(test_sets=TestSets([("trec", "k2")])), query="K2") is None


def test_limits_are_settings():
    assert verdict(FilterSettings(length_limits={"short_long": LengthLimits(query=(1, 10))})) == "length"


def test_skipped_filters_do_not_run():
    record = {**RECORD, "positive": GERMAN}
    assert judge(record, FilterSettings(), frozenset(["wrong_language"])) is None


def test_every_filter_says_what_it_does():
    assert all(function.__doc__ for function in FILTERS.values())


def test_no_false_positives_on_the_sample_set():
    """The records were written with care by a strong LLM: what is dropped of them is an error of a filter."""
    with SAMPLE.open(encoding="utf-8") as lines:
        dropped = [(row["id"], found) for row in map(json.loads, lines) if (found := judge(row, FilterSettings()))]
    assert dropped == []


def test_wrong_languages_are_found(sample_rows):
    """Every sample text of some length, said to be in each of a dozen languages that it is not in."""
    claimed = ["en", "de", "pl", "ja", "ar", "fa", "hi", "sw", "uz", "cy", "su", "yi", "fil"]
    checked = missed = 0
    for row in sample_rows[:150]:
        text, language = row["positive"], row["document_language"]
        if len(text) < 100:
            continue
        for other in claimed:
            # Sundanese, Yiddish, Persian: the model takes their neighbours for them, by design.
            near = {language, other} & {"id", "ms", "jv", "he", "ur", "ps"}
            if other != language and not near:
                checked += 1
                missed += detect_other_language(text, other) is None
    assert checked > 500
    assert missed / checked < 0.01


def test_93_languages_can_be_judged_or_have_a_stand_in():
    text = "한국어로 쓰인 이 문장은 다른 어떤 언어로도 오해받지 않을 만큼 충분히 길게 쓰여 있다."
    for code in load_languages():
        assert (detect_other_language(text, code) is None) == (code == "ko")
    assert detect_other_language(text, "ko-KR") is None
    assert detect_other_language(text, "tlh") is None
    assert detect_other_language("", "en") is None
