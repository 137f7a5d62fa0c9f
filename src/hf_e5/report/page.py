"""One HTML file to read a report and to browse its records: no server, no network, safe with whatever a model wrote.

Texts of records travel as JSON that cannot close its script element, and the page's script makes text nodes of them. A
content security policy lets no other script run and nothing be loaded, should that ever fail.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..languages import load_languages
from ..records import RECORD_COLUMNS


COLUMNS = (*RECORD_COLUMNS, "dropped_by", "reason", "line")


@dataclass(frozen=True)
class Table:
    """A table of the overview; cells are shown as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def render_page(
    *,
    title: str,
    tiles: Sequence[tuple[str, str]],
    notes: Sequence[str],
    tables: Sequence[Table],
    figure: str,
    records: Iterable[Mapping[str, Any]],
) -> str:
    """Return the page.

    Args:
        title: heading of the page.
        tiles: (label, figure) pairs shown large at the top.
        notes: sentences below them, such as that the page shows a sample.
        tables: tables of the overview.
        figure: the trusted SVG element of figure 2.
        records: rows to browse; untrusted.
    """
    environment = Environment(
        loader=PackageLoader("hf_e5.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset("report.js")
    return environment.get_template("report.html.jinja").render(
        title=title,
        tiles=tiles,
        notes=notes,
        tables=tables,
        figure=figure,
        css=_asset("report.css"),
        script=script,
        script_hash=f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
        data=_embed(records),
    )


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _embed(records: Iterable[Mapping[str, Any]]) -> str:
    """Return JSON that is safe inside a script element: no "<", hence no "</script>" and no "<!--"."""
    data = {
        "columns": COLUMNS,
        "rows": [[_cell(name, record.get(name)) for name in COLUMNS] for record in records],
        "languages": {code: language.name for code, language in load_languages().items()},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Half of a surrogate pair has no UTF-8 form; "backslashreplace" makes it JSON's own escape.
    return text.replace("<", "\\u003c").encode(errors="backslashreplace").decode()


def _cell(column: str, value: Any) -> Any:
    """A dropped record may hold anything where the page expects a text: show its JSON."""
    is_plain = column == "placeholders" or value is None or isinstance(value, str)
    return value if is_plain else json.dumps(value, ensure_ascii=False)
