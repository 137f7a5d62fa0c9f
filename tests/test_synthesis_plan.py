"""The plan: the paper's shares, determinism, shards, and what a configuration may change."""

import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import yaml

from hf_e5.errors import InputError
from hf_e5.languages import load_languages
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.cost import describe_plan
from hf_e5.synthesis.plan import Plan, Task, apportion


TASKS = [Task("Given a question, find its answer.", "science"), Task("Given a title, find the paper.", "law")]
FIGURE_2 = {"short_long": 167, "long_short": 122, "sts": 99, "bitext": 89, "long_long": 17, "short_short": 13}


def requests(plan, limit=None):
    for position in plan.positions(limit):
        two_step = plan.config.task_types[position.task_type].brainstorm
        yield plan.example(position, TASKS if two_step else None)


def config(**settings):
    return load_config({"models": ["m"], **settings})


def test_languages_are_those_of_the_paper():
    languages = load_languages()
    assert len(languages) == 93
    assert sum(language.share for language in languages.values()) == pytest.approx(1)
    assert languages["en"].share == pytest.approx(0.431)
    tail = [language.share for language in languages.values() if language.share < 0.02]
    assert len(tail) == 79
    assert sum(tail) == pytest.approx(0.198)


def test_shares_of_a_plan_of_100k():
    plan = Plan(config(num_examples=100_000, models={"a": 0.75, "b": 0.25}), seed=3)
    types, languages, models, english = Counter(), Counter(), Counter(), Counter()
    for request in requests(plan):
        types[request.task_type] += 1
        languages[request.language] += 1
        models[request.model] += 1
        english[request.task_type] += request.language == "en"
    for name, thousands in FIGURE_2.items():
        assert types[name] == pytest.approx(100_000 * thousands / 507, rel=0.01)
        assert english[name] / types[name] == pytest.approx(0.431, abs=0.01)
    for code, language in load_languages().items():
        assert languages[code] == pytest.approx(100_000 * language.share, rel=0.01)
    assert models["b"] == pytest.approx(25_000, rel=0.02)


def test_every_prefix_of_the_full_plan_holds_the_shares():
    types, languages = Counter(), Counter()
    for request in requests(Plan(config()), limit=20_000):
        types[request.task_type] += 1
        languages[request.language] += 1
    for name, thousands in FIGURE_2.items():
        assert types[name] == pytest.approx(20_000 * thousands / 507, abs=1)
    assert languages["en"] == pytest.approx(8620, rel=0.01)
    assert len(languages) == 93


@pytest.mark.parametrize(("size", "num_shards"), [(10_000, 4), (100_000, 2), (100_000, 3), (100_000, 16)])
def test_every_shard_holds_the_languages_more_evenly_than_independent_draws(size, num_shards):
    """Of independent draws, the largest error of 93 languages is above two standard deviations in 99 % of shards."""
    codes = list(load_languages())
    shares = np.array([language.share for language in load_languages().values()])
    for number in range(num_shards):
        plan = Plan(config(num_examples=size), shard=(number, num_shards))
        languages = Counter(position.language for position in plan.positions())
        total = languages.total()
        errors = np.array([languages[code] for code in codes]) - total * shares
        assert np.max(np.abs(errors) / np.sqrt(total * shares * (1 - shares))) < 2


def test_the_languages_of_the_whole_plan_are_exact_to_one_example():
    for size in (93, 1009, 20_000):
        counts = Counter(position.language for position in Plan(config(num_examples=size)).positions())
        for code, language in load_languages().items():
            assert abs(counts[code] - size * language.share) < 1


def test_a_plan_takes_few_bytes_per_example():
    size = 507_000
    settings = config(num_examples=size)
    tracemalloc.start()
    plan = Plan(settings)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(islice(plan.positions(), 5))) == 5
    assert taken < 9 * size  # type and language take 2 bytes, the index 4


def test_the_places_of_a_type_are_those_of_the_plan():
    plan = Plan(config(num_examples=2000), shard=(1, 3))
    places = list(plan.positions(500))
    for name in plan.counts:
        assert list(plan.positions(500, name)) == [place for place in places if place.task_type == name]
    assert plan.num_examples(500) == Counter(place.task_type for place in places)


def test_placeholders_are_those_of_the_paper_and_keep_their_weights():
    values: dict[tuple[str, str], Counter] = {}
    pairs = Counter()
    for request in requests(Plan(config(num_examples=20_000))):
        for name, value in request.placeholders.items():
            values.setdefault((request.task_type, name), Counter())[value] += 1
        if request.task_type == "bitext":
            assert request.language != request.document_language
            pairs[request.language, request.document_language] += 1
        else:
            assert request.language == request.document_language
    assert {name for task, name in values if task == "short_long"} == {
        "domain", "query_type", "query_length", "clarity", "num_words", "difficulty",
    }  # fmt: skip
    assert set(values["short_long", "num_words"]) == {"50", "100", "200", "300", "400", "500"}
    assert set(values["bitext", "low_score"]) == {"1.5", "2", "2.5"}
    assert set(values["sts", "low_score"]) == {"2.5", "3", "3.5"}
    lengths = values["short_long", "query_length"]
    assert lengths["at least 10 words"] / lengths.total() == pytest.approx(0.2, abs=0.02)
    assert values["sts", "unit"]["sentence"] / values["sts", "unit"].total() == pytest.approx(0.9, abs=0.02)
    assert len(pairs) > 500


def test_one_seed_plans_the_same_and_another_does_not():
    first, again, other = (
        [(r, tuple(m["content"] for m in plan.call(r).messages)) for r in requests(plan)]
        for plan in (Plan(config(num_examples=300), seed) for seed in (1, 1, 2))
    )
    assert first == again
    assert {r.id for r, _ in first}.isdisjoint(r.id for r, _ in other)
    assert [text for _, text in first] != [text for _, text in other]


def test_shards_are_disjoint_and_make_up_the_plan():
    whole = {request.id: request.language for request in requests(Plan(config(num_examples=1000)))}
    parts = [Plan(config(num_examples=1000), shard=(number, 3)) for number in range(3)]
    joined = [(request.id, request.language) for part in parts for request in requests(part)]
    assert len(joined) == 1000
    assert dict(joined) == whole
    brainstorms = {part.brainstorm("short_long", number).id for part in parts for number in range(4)}
    assert len(brainstorms) == 12


def test_a_plan_needs_the_tasks_of_its_prefix_only():
    plan = Plan(config())
    assert sum(plan.num_tasks(10).values()) <= 8
    # The paper has about 150,000 instructions for its 319,000 two-step examples.
    assert sum(plan.num_tasks().values()) == pytest.approx(160_000, rel=0.01)


def test_examples_of_a_task_follow_one_another():
    plan = Plan(config(num_examples=8, mixture={"short_long": 1}))
    instructions = [request.instruction for request in requests(plan)]
    assert instructions == [TASKS[i // 2 % 2].instruction for i in range(8)]


@pytest.mark.parametrize("name", sorted(FIGURE_2))
def test_a_prompt_asks_for_everything_in_the_paper(name):
    plan = Plan(config(num_examples=50, mixture={name: 1}))
    request = next(requests(plan))
    (message,) = plan.call(request).messages
    task = plan.config.task_types[name]
    prompt = message["content"]
    for value in [v for key, v in request.placeholders.items() if key != "domain" or not task.brainstorm]:
        assert value in prompt
    for key in filter(None, (task.fields.query, task.fields.positive, task.fields.negative)):
        assert f'"{key}"' in prompt
    assert load_languages()[request.language].name in prompt
    assert load_languages()[request.document_language].name in prompt
    assert "JSON object alone" in prompt
    assert "\n\n\n" not in prompt


def test_brainstorms_show_shuffled_examples_and_visit_every_domain():
    plan = Plan(config(domains=["law", "music", "sports"], mixture={"short_long": 1}))
    calls = [plan.brainstorm("short_long", number) for number in range(6)]
    assert sorted(call.placeholders["domain"] for call in calls[:3]) == ["law", "music", "sports"]
    prompts = {plan.call(call).messages[0]["content"] for call in calls}
    assert len(prompts) == 6
    assert all("about 20 strings" in prompt for prompt in prompts)


def test_apportion_adds_up():
    assert apportion({"a": 1, "b": 1, "c": 1}, 100) == {"a": 34, "b": 33, "c": 33}
    assert sum(apportion(dict(FIGURE_2), 1009).values()) == 1009


def test_a_user_adds_a_type_with_an_own_template(tmp_path):
    (tmp_path / "claim.jinja").write_text('Write a {{ tone }} claim in {{ language }} as {"{{ fields.query }}": ...}.')
    settings = {
        "num_examples": 10,
        "models": ["m"],
        "mixture": {"claim": 1},
        "languages": ["yo"],
        "language_names": {"yo": "Yoruba"},
        "domains": ["folk medicine"],
        "task_types": {
            "claim": {
                "instruction": "Given a claim, retrieve texts that refute it.",
                "template": "claim.jinja",
                "fields": {"query": "claim", "positive": "refutation"},
                "placeholders": {"tone": {"sober": 1, "heated": 0}},
            }
        },
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    plan = Plan(load_config(tmp_path / "own.yaml"))
    request = next(requests(plan))
    content = 'Write a sober claim in Yoruba as {"claim": ...}.'
    assert plan.call(request).messages == [{"role": "user", "content": content}]
    assert request.placeholders == {"domain": "folk medicine", "tone": "sober"}


def test_a_hard_negative_can_be_asked_for_where_the_paper_has_none():
    changed = config(
        num_examples=4,
        mixture={"short_short": 1},
        task_types={"short_short": {"fields": {"negative": "hard_negative"}}},
    )
    plan = Plan(changed)
    request = next(requests(plan))
    call = plan.call(request)
    assert '"hard_negative"' in call.messages[0]["content"]
    assert set(call.answer_model.model_fields) == {"input", "positive_document", "hard_negative"}


def test_a_bilingual_type_with_one_document_language():
    fixed = config(num_examples=50, mixture={"bitext": 1}, languages=["en"], document_languages=["so", "en"])
    assert {(r.language, r.document_language) for r in requests(Plan(fixed))} == {("en", "so")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_example": 3}, "num_example"),
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": 10**12}, "num_examples"),
        ({"languages": ["klingon"]}, "klingon"),
        ({"mixture": {"stss": 1}}, "stss"),
        ({"mixture": {"bitext": 1}, "languages": ["en"]}, "two languages"),
        ({"mixture": {"bitext": 1}, "languages": {"en": 1, "de": 0}}, "two languages"),
        ({"task_types": {"x": {"template": "sts.jinja", "fields": {"query": "a", "positive": "b"}}}}, "x"),
        ({"task_types": {"sts": {"template": "absent.jinja"}}}, "absent.jinja"),
        ({"task_types": {"sts": {"placeholders": {"unit": 3}}}}, "unit"),
        ({"task_types": ["sts"]}, "task_types"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(tmp_path, settings, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_template_that_uses_an_unknown_name(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ colour }}")
    (tmp_path / "c.yaml").write_text("{models: [m], mixture: {sts: 1}, task_types: {sts: {template: t.jinja}}}")
    plan = Plan(load_config(tmp_path / "c.yaml"))
    with pytest.raises(InputError, match="colour"):
        plan.call(next(requests(plan)))


def test_templates_are_sandboxed(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (tmp_path / "c.yaml").write_text("{models: [m], mixture: {sts: 1}, task_types: {sts: {template: t.jinja}}}")
    plan = Plan(load_config(tmp_path / "c.yaml"))
    with pytest.raises(InputError):
        plan.call(next(requests(plan)))


def test_the_estimate_tells_counts_and_cost():
    text = describe_plan(Plan(config(models={"gpt-4o": 0.75, "gpt-4o-mini": 0.25})))
    assert "507,000 examples" in text
    assert "English 43.1%" in text
    assert "about $" in text
    assert "no price" in describe_plan(Plan(config()), 100)
