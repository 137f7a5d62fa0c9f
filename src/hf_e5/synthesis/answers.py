"""An answer becomes a row of `answers.jsonl` (columns: `store.py`): it is parsed, and made a record or a task list."""

from __future__ import annotations

from typing import Any

from ..records import RECORD_COLUMNS
from .client import Answer
from .config import SynthesisConfig
from .parsing import ParseError, parse_answer
from .plan import Request
from .taxonomy import TaskList


def answer_row(
    request: Request, attempt: int, answer: Answer, config: SynthesisConfig, cost: float | None
) -> dict[str, Any]:
    """Return the row for the answer to a request; `cost` is in USD, None without a price."""
    content, error = _read(request, answer, config)
    return {
        "id": request.id,
        "kind": request.kind,
        "task_type": request.task_type or None,
        "language": request.language,
        "document_language": request.document_language,
        "model": request.model,
        "attempt": attempt,
        "final": error is None or answer.final or attempt >= config.answer_attempts,
        "error": error,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cost": cost,
        "request_id": answer.request_id,
        "finish_reason": answer.finish_reason,
        **content,
    }


def _read(request: Request, answer: Answer, config: SynthesisConfig) -> tuple[dict[str, Any], str | None]:
    """Return the column that holds the content, and why the answer cannot be used (None if it can)."""
    raw = {"raw": answer.text}
    if request.kind == "probe":
        return raw, None
    if answer.error:
        return raw, answer.error
    # A truncated list still has whole items; a truncated document is useless.
    if answer.finish_reason == "length" and request.kind == "example":
        return raw, "length: the answer was cut at the token limit"
    task = config.task_types[request.task_type]
    try:
        parsed = parse_answer(answer.text, TaskList if request.kind == "brainstorm" else task.answer_model)
    except ParseError as error:
        return raw, str(error)
    if isinstance(parsed, TaskList):
        return {"tasks": parsed.tasks}, None
    texts = {name: getattr(parsed, key) for name, key in task.fields if key}
    values = {**vars(request), **texts}
    return {"record": {column: values.get(column) for column in RECORD_COLUMNS}}, None
