"""The stream of requests: fixed by the plan and the answers, whatever the order in which these come."""

import asyncio
import json
import random

import pytest

from hf_e5.synthesis.client import Answer
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.cost import Budget
from hf_e5.synthesis.executors.online import OnlineExecutor
from hf_e5.synthesis.plan import Plan, Task
from hf_e5.synthesis.run import SynthesisRun, TaskPool
from hf_e5.synthesis.store import AnswerStore


class Model:
    """Answers each request in one way only, after a wait that is random; some lists are no use, tasks recur."""

    def __init__(self, seed, wait=0.0):
        self.rng = random.Random(seed)
        self.wait = wait
        self.calls = []

    async def ask(self, call):
        self.calls.append(call)
        await asyncio.sleep(self.rng.random() * self.wait)
        rng = random.Random(call.id)
        if "-tasks-" in call.id and rng.random() < 0.2:
            return Answer(text="no ideas", final=True)
        values = {
            key: [f"Find {rng.randrange(150)}." for _ in range(20)] if key == "tasks" else f"{key} {rng.random()}"
            for key in call.answer_model.model_fields
        }
        return Answer(text=json.dumps(values))


def run(folder, model, concurrency, max_examples=None, **settings):
    async def main():
        store = AnswerStore(folder)
        plan = Plan(load_config({"models": ["m"], **settings}))
        synthesis = SynthesisRun(plan, store, Budget(store), max_examples)
        await OnlineExecutor(synthesis, model, concurrency).run()
        synthesis.close()
        store.close()
        return synthesis

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_answers_in_any_order_lead_to_the_same_requests(tmp_path):
    asked = []
    for number, (concurrency, wait) in enumerate([(1, 0.0), (7, 0.01), (64, 0.02)]):
        model = Model(number, wait)
        synthesis = run(tmp_path / str(number), model, concurrency, num_examples=400)
        asked.append({call.id: call.messages for call in model.calls})
        assert len(asked[-1]) == len(model.calls)
        assert synthesis.store.examples == 400
    assert asked[0] == asked[1] == asked[2]


def test_a_run_in_parts_makes_the_requests_of_one_run(tmp_path):
    whole, parts = Model(0), Model(1, 0.01)
    run(tmp_path / "whole", whole, 1, num_examples=300)
    for limit in (40, 41, 200, None):
        run(tmp_path / "parts", parts, 32, limit, num_examples=300)
    examples = [
        sorted((call.id, str(call.messages)) for call in model.calls if "-tasks-" not in call.id)
        for model in (whole, parts)
    ]
    assert examples[0] == examples[1]


def test_alone_at_a_time_the_examples_come_in_the_order_of_the_plan(tmp_path):
    model = Model(0)
    synthesis = run(tmp_path, model, 1, num_examples=200)
    examples = [call.id for call in model.calls if "-tasks-" not in call.id]
    assert examples == [synthesis.plan.example_id(position) for position in synthesis.plan.positions()]


def test_examples_do_not_wait_for_brainstorms_that_are_not_theirs(tmp_path):
    """One list comes last of all: held back until every example that can do without it is answered."""
    settings = {"num_examples": 300, "mixture": {"short_long": 1, "long_short": 1, "sts": 1}}
    held = "0-short_long-tasks-00001"

    class Slow(Model):
        async def ask(self, call):
            if call.id == held:
                # 100 each of `sts` and `long_short`; of `short_long` two for each of the 20 tasks of the first list.
                while sum("-tasks-" not in other.id for other in self.calls) < 100 + 100 + 40:
                    await asyncio.sleep(0.01)
            self.calls.append(call)
            values = {
                key: [f"Find {call.id} {n}." for n in range(20)] if key == "tasks" else key
                for key in call.answer_model.model_fields
            }
            return Answer(text=json.dumps(values))

    model = Slow(0)
    synthesis = run(tmp_path, model, 8, **settings)
    assert synthesis.store.examples == 300
    assert [call.id for call in model.calls].index(held) >= 240


def test_no_type_runs_far_ahead_of_one_that_waits(store):
    """A budget may end the run at any moment; what it leaves should hold the types about in their shares."""
    plan = Plan(load_config({"models": ["m"], "num_examples": 30_000, "mixture": {"short_long": 1, "sts": 1}}))
    requests = SynthesisRun(plan, store, Budget(store)).requests()
    drawn = list(iter(lambda: next(requests), None))
    brainstorms = [request for request in drawn if request.kind == "brainstorm"]
    assert drawn[: len(brainstorms)] == brainstorms
    assert {request.task_type for request in drawn[len(brainstorms) :]} == {"sts"}
    assert len(drawn) - len(brainstorms) == pytest.approx(1000, abs=2)  # every other place of 2,000
    store.done.add(brainstorms[0].id)
    store.tasks[brainstorms[0].id] = [f"Find {number}." for number in range(20)]
    follow = list(iter(lambda: next(requests), None))
    assert [request.task_type for request in follow].count("short_long") == 40
    assert len(follow) == pytest.approx(80, abs=2)


@pytest.fixture
def store(tmp_path):
    store = AnswerStore(tmp_path)
    yield store
    store.close()


def test_pools_are_deduplicated(store):
    pool = TaskPool(Plan(load_config({"models": ["m"]})), store, "short_long", 10)
    pool.add(["Find x.", "find  X", "Find y."], "law")
    pool.add(["Find y", "Find z."], "art")
    assert pool.tasks == [Task("Find x.", "law"), Task("Find y.", "law"), Task("Find z.", "art")]


def test_a_pool_keeps_the_order_of_its_calls(store):
    pool = TaskPool(Plan(load_config({"models": ["m"]})), store, "short_long", 40)
    requests = pool.requests()
    first, second = next(requests), next(requests)
    for call in (second, first):
        assert next(requests) is None
        assert pool.tasks == []
        store.done.add(call.id)
        store.tasks[call.id] = [f"Find {call.id} {number}." for number in range(20)]
    assert next(requests, "end") == "end"
    assert pool.complete
    assert [task.instruction for task in pool.tasks] == [
        task for call in (first, second) for task in store.tasks[call.id]
    ]
