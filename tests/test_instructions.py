from importlib.resources import files

import pytest
import yaml

from hf_e5.instructions import BITEXT_INSTRUCTION, STS_INSTRUCTION, format_query


@pytest.mark.parametrize("task_type, instruction", [("sts", STS_INSTRUCTION), ("bitext", BITEXT_INSTRUCTION)])
def test_exported_prompts_are_those_of_the_synthetic_data(task_type, instruction):
    task_types = yaml.safe_load((files("hf_e5.synthesis") / "resources" / "task_types.yaml").read_text())
    assert task_types[task_type]["instruction"] == instruction


def test_a_query_without_instruction_is_bare():
    assert format_query("how tall is K2") == "how tall is K2"
    assert format_query("how tall is K2", "Find it") == "Instruct: Find it\nQuery: how tall is K2"
