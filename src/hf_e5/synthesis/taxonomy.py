"""What can be generated: task types, their placeholders and the shape of an answer (paper, section 3.1, appendix C).

The six types of the paper are data (`resources/task_types.yaml`); a configuration overrides them or adds its own in
the same words.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib.resources import files
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, create_model, field_validator


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


Text = Annotated[StrictStr, AfterValidator(_not_blank)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Fields(_Settings):
    """The keys of the JSON object that an answer holds; without `negative` no hard negative is asked for."""

    query: str
    positive: str
    negative: str | None = None


class Brainstorm(_Settings):
    """The first of two steps: a call that lists tasks. Shows `num_shown` of the `examples`, drawn and shuffled."""

    template: str = "brainstorm.jinja"
    examples: list[str] = []
    num_shown: int = Field(2, ge=0)
    num_tasks: int = Field(20, ge=1)


class TaskType(_Settings):
    """One kind of example. With `brainstorm` its instruction is a brainstormed task, otherwise `instruction`.

    `placeholders` maps a name to its values and their weights (a plain list means equal weights); a placeholder's
    value is drawn anew for every example and is known to the template under its name. `bilingual` types draw a second
    language for the documents. `weight` is the share in the mixture, in any unit.
    """

    weight: float = Field(1, ge=0)
    template: str
    fields: Fields
    instruction: str | None = None
    brainstorm: Brainstorm | None = None
    bilingual: bool = False
    placeholders: dict[str, dict[str, float]] = {}
    output_tokens: int = Field(300, ge=1)

    @field_validator("placeholders", mode="before")
    @classmethod
    def _weigh(cls, placeholders: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {name: weighted(values, name) for name, values in placeholders.items()}

    @cached_property
    def answer_model(self) -> type[BaseModel]:
        """The pydantic model of an answer: every field a string that is not empty; further keys are ignored."""
        keys = [key for key in (self.fields.query, self.fields.positive, self.fields.negative) if key]
        return create_model("Example", **dict.fromkeys(keys, (Text, ...)))  # type: ignore[call-overload]


class TaskList(BaseModel):
    """The answer to a brainstorm."""

    tasks: list[Text]


def weighted(values: Any, name: str = "values") -> dict[str, float]:
    """Turn a list of values (equal weights) or a mapping of values to weights into the latter, keys as strings."""
    if isinstance(values, list):
        values = dict.fromkeys(map(str, values), 1.0)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{name}: expected a list of values, or a mapping of values to weights")
    weights = {str(value): float(weight) for value, weight in values.items()}
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"{name}: weights must not be negative, and one must be positive")
    return weights


@cache
def answer_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema that asks a server for an answer, in the strict form of structured output."""
    schema = model.model_json_schema()
    return {**schema, "additionalProperties": False}


@cache
def builtin_task_types() -> dict[str, Any]:
    """Return the paper's six task types as plain data, by name."""
    text = files("hf_e5.synthesis").joinpath("resources/task_types.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
