"""Reading answers: every way models wrap, break and cut JSON. Nothing in an answer is ever executed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.parsing import ParseError, parse_answer, strip_thoughts
from hf_e5.synthesis.taxonomy import TaskList


STS = load_config({"models": ["m"]}).task_types["sts"].answer_model
GOOD = {"S1": 'He said "hi".', "S2": "A, b] and {c}", "S3": "line\nbreak \\ slash"}
PLAIN = json.dumps(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        json.dumps(GOOD, indent=2),
        f"```json\n{PLAIN}\n```",
        f"Sure! Here is [one] example for {{you}}:\n\n{PLAIN}\n\nI hope this helps {{:",
        f"<think>maybe {{'S1': 1}} or [2]</think>{PLAIN}",
        f"thinking without an opening tag </think>\n{PLAIN}",
        PLAIN[:-1] + ",}",
        PLAIN[:-1] + " , \n }",
        PLAIN[:-1],
        PLAIN[:-1] + ",",
        PLAIN.replace("\\n", "\n"),
        PLAIN[:-1] + ', "note": "more keys are ignored"}',
        json.dumps({"properties": {"S1": {"type": "string"}}}) + PLAIN,
    ],
)
def test_what_can_be_read(text):
    assert parse_answer(text, STS).model_dump() == GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "json"),
        ("I cannot help with that.", "json"),
        (PLAIN[: len(PLAIN) * 2 // 3], "S3"),
        (PLAIN[:-2], "json"),
        ("<think>" + PLAIN, "json"),
        ('{"S1": "a", "S2": "b"}', "S3"),
        ('{"S1": "a", "S2": "b", "S3": "  "}', "S3"),
        ('{"S1": "a", "S2": "b", "S3": ["c"]}', "S3"),
        ('{"S1": "a", "S2": 5, "S3": "c"}', "S2"),
        (json.dumps(STS.model_json_schema()), "repeated the schema"),
        ("[" * 100_000, "json"),
        ('{"a":' * 100_000, "json"),
        ("__import__('os').system('touch hacked')", "json"),
    ],
)
def test_what_cannot_be_read_has_a_reason(text, reason):
    with pytest.raises(ParseError, match=reason):
        parse_answer(text, STS)


@pytest.mark.parametrize(
    "text",
    [
        '{"tasks": ["Find a.", "Find b."]}',
        '["Find a.", "Find b."]',
        'Here you are:\n```python\n["Find a.", "Find b.",]\n```',
        '{"ideas": ["Find a.", "Find b."]}',
        '{"tasks": [{"task": "Find a."}, {"task": "Find b."}]}',
        '{"tasks": ["Find a.", "Find b.", "Find c, whi',
        "- Find a.\n- Find b.",
        "1. Find a.\n2. Find b.",
        "Some ideas:\n\n* Find a.\n* Find b.\n",
        "['Find a.',\n 'Find b.']",
    ],
)
def test_brainstorms_come_in_many_forms(text):
    assert parse_answer(text, TaskList).tasks == ["Find a.", "Find b."]


@pytest.mark.parametrize("text", ["", "No.", '{"tasks": []}', '{"tasks": [1, 2]}', '{"tasks": "Find a."}'])
def test_brainstorms_without_tasks(text):
    with pytest.raises(ParseError):
        parse_answer(text, TaskList)


def test_thoughts_are_cut():
    assert strip_thoughts("<think>a</think> b") == "b"
    assert strip_thoughts("b <think>cut at the tok") == "b"


@given(st.dictionaries(st.sampled_from(["S1", "S2", "S3"]), st.text(min_size=1), min_size=3), st.text(max_size=30))
def test_any_text_survives_prose_around_it(values, prose):
    values = {key: value.strip() or "x" for key, value in values.items()}
    noise = prose.replace("{", "").replace("[", "").replace("<", "")
    assert parse_answer(f"{noise}{json.dumps(values)}{noise}", STS).model_dump() == values


@given(st.text(), st.integers(0, 60))
def test_no_text_breaks_the_parser(text, cut):
    for answer in (text, PLAIN[:cut] + text, '{"tasks": [' + text):
        for model in (STS, TaskList):
            try:
                parse_answer(answer, model)
            except ParseError as error:
                assert str(error)
