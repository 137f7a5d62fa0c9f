"""The configuration of a synthesis run: what to generate, in one YAML file (see `recipes/synthesis/`)."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader, PackageLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ..config import read_yaml
from ..errors import InputError
from ..languages import language_name, load_languages
from ..shipped_recipes import config_path
from .taxonomy import TaskType, builtin_task_types, weighted


class SynthesisConfig(BaseModel):
    """What to generate. Every field has the paper's value as its default.

    Args:
        num_examples: size of the whole plan; the paper's figure 2 adds up to 507,000.
        task_types: new types, or changes to the built-in ones (`taxonomy.TaskType`).
        mixture: task types and their shares in any unit; all types with their own `weight` when left out.
        models: model names and their shares of the calls.
        language_names: English names of further languages by ISO code.
        languages: ISO codes (a list means equal shares, a mapping gives them); the paper's 93 when left out.
        document_languages: the same for the documents of bilingual types; `languages` when left out.
        domains: topics that seed brainstorms and one-step examples.
        examples_per_task: examples written for each brainstormed task; the paper has about two.
        max_answer_tokens: a longer answer is cut by the server and counts as a failure.
        answer_attempts: answers asked for one example before it counts as failed.
        timeout: seconds to wait for one answer.
        prices: USD per million input and output tokens by model name, before those of `resources/prices.tsv`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    num_examples: int = Field(507_000, ge=1, le=100_000_000)
    task_types: dict[str, TaskType]
    mixture: dict[str, float] = {}
    models: dict[str, float] = {}
    language_names: dict[str, str] = {}
    languages: dict[str, float] = {}
    document_languages: dict[str, float] = {}
    domains: list[str] = []
    examples_per_task: int = Field(2, ge=1)
    system_prompt: str | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_answer_tokens: int | None = Field(4096, ge=1)
    answer_attempts: int = Field(2, ge=1)
    timeout: float = Field(300.0, gt=0)
    prices: dict[str, tuple[float, float]] = {}
    template_folder: Path | None = Field(None, exclude=True)

    @field_validator("mixture", "models", "languages", "document_languages", mode="before")
    @classmethod
    def _fill_weights(cls, values: Any, info: ValidationInfo) -> dict[str, float]:
        if values:
            return weighted(values)
        if info.field_name == "mixture":
            return {name: task.weight for name, task in info.data.get("task_types", {}).items()}
        if info.field_name == "languages":
            return {language.code: language.share for language in load_languages().values()}
        return info.data.get("languages", {}) if info.field_name == "document_languages" else {}

    @field_validator("mixture")
    @classmethod
    def _drop_unused(cls, mixture: dict[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in mixture.items() if weight}

    @field_validator("domains", mode="before")
    @classmethod
    def _fill_domains(cls, domains: Any) -> Any:
        listed = files("hf_e5.synthesis").joinpath("resources/domains.txt")
        return domains or listed.read_text(encoding="utf-8").splitlines()

    @model_validator(mode="after")
    def _check(self) -> SynthesisConfig:
        if unknown := set(self.mixture) - set(self.task_types):
            raise ValueError(f"mixture: no task type is called {sorted(unknown)[0]!r}")
        for code in {*self.languages, *self.document_languages}:
            self.language_name(code)
        for name in self.mixture:
            self._check_task_type(name, self.task_types[name])
        return self

    def _check_task_type(self, name: str, task: TaskType) -> None:
        if (task.brainstorm is None) == (task.instruction is None):
            raise ValueError(f"task_types.{name}: give either `brainstorm` (two steps) or `instruction` (one step)")
        weights = [*self.languages.items(), *self.document_languages.items()]
        if task.bilingual and len({code for code, weight in weights if weight}) < 2:
            raise ValueError(f"task_types.{name}: a bilingual type needs two languages; add `document_languages`")
        for template in [task.template, *([task.brainstorm.template] if task.brainstorm else [])]:
            try:
                self.templates.get_template(template)
            except TemplateError as error:
                raise ValueError(f"task_types.{name}: template {template!r}: {error}") from None

    @cached_property
    def templates(self) -> SandboxedEnvironment:
        """The templates: the user's beside the YAML file first, then the package's. Sandboxed: they are data."""
        own = [FileSystemLoader(self.template_folder)] if self.template_folder else []
        loader = ChoiceLoader([*own, PackageLoader("hf_e5.synthesis", "prompts")])
        return SandboxedEnvironment(loader=loader, undefined=StrictUndefined, trim_blocks=True, autoescape=False)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the plan; runs with one fingerprint and seed plan the same requests."""
        not_planned = {"models", "prices", "timeout", "answer_attempts", "max_answer_tokens"}
        content = json.dumps(self.model_dump(mode="json", exclude=not_planned), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def render(self, template: str, **values: Any) -> str:
        """Fill a template.

        Raises:
            InputError: it uses a name that is not given, or is no valid template.
        """
        try:
            return self.templates.get_template(template).render(**values).strip()
        except TemplateError as error:
            raise InputError(f"template {template}: {error}") from None

    def language_name(self, code: str) -> str:
        """Return the English name of a language, as prompts have it.

        Raises:
            ValueError: it is neither one of the 93 nor in `language_names`.
        """
        if code in self.language_names:
            return self.language_names[code]
        try:
            return language_name(code)
        except KeyError:
            raise ValueError(
                f"languages: {code!r} is not known; name it, `language_names: {{{code}: NAME}}`"
            ) from None


def load_config(source: str | Path | dict[str, Any] | SynthesisConfig, **overrides: Any) -> SynthesisConfig:
    """Read a configuration from a YAML file, the name of a shipped recipe, or a mapping.

    `overrides` that are not None replace its keys.

    Raises:
        InputError: it cannot be read, or a value is wrong; the message names the file and the key.
    """
    if isinstance(source, SynthesisConfig):
        return source.model_copy(update={key: value for key, value in overrides.items() if value is not None})
    where, folder = "configuration", None
    if isinstance(source, dict):
        data = source
    else:
        source = config_path(str(source), "synthesis")
        where, folder = str(source), source.parent
        data = read_yaml(source)
    data = {**data, **{key: value for key, value in overrides.items() if value is not None}}
    try:
        data["task_types"] = _merge_task_types(data.get("task_types") or {})
        return SynthesisConfig(template_folder=folder, **data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None


def _merge_task_types(changes: dict[str, Any]) -> dict[str, Any]:
    """Lay the user's task types over the built-in ones, key by key."""
    if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
        raise ValueError("task_types: expected a mapping of names to settings")
    merged = dict(builtin_task_types())
    for name, change in changes.items():
        base = merged.get(name, {})
        merged[name] = {**base, **change}
        for key in ("brainstorm", "fields", "placeholders"):
            if isinstance(base.get(key), dict) and isinstance(change.get(key), dict):
                merged[name][key] = {**base[key], **change[key]}
    return merged
