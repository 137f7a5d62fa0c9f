"""Figure 2 of the paper for any set of records: shares of task types and of languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..languages import load_languages


# As many languages as the paper names; the rest is one bar.
MAX_LANGUAGES = 14
MAX_NAME = 24

_MIN_ROWS = 7
_BLUE, _GREY, _ORANGE, _INK = "#0072B2", "#B8BEC6", "#D55E00", "#1F2933"


def plot_shares(task_types: Mapping[str, int], languages: Mapping[str, int], stem: str | Path) -> list[Path]:
    """Draw both shares side by side and write `stem`.png and `stem`.svg.

    Where all task types are the paper's, a mark on each bar shows the paper's share.

    Args:
        task_types: number of records by task type.
        languages: number of records by ISO code of the query's language.
        stem: path without suffix.

    Returns:
        The two paths.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from ..synthesis.taxonomy import builtin_task_types
    except ImportError:
        raise InputError("figures need matplotlib: pip install hf-e5[synthesis]") from None

    weights = {name: task["weight"] for name, task in builtin_task_types().items()}
    types = dict(Counter(task_types).most_common())
    targets = [100 * weights[name] / sum(weights.values()) for name in types] if types.keys() <= weights.keys() else []
    ranked = Counter(languages).most_common()
    names = load_languages()
    shown = {names[code].name if code in names else code: count for code, count in ranked[:MAX_LANGUAGES]}
    rest = ranked[MAX_LANGUAGES:]

    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    # A fixed salt makes two runs give the same file.
    style: dict[Any, Any] = {"svg.hashsalt": "hf-e5", "font.family": "DejaVu Sans", "font.size": 11}
    # A "$" in a name is no mathematics.
    with rc_context(style | {"text.color": _INK, "ytick.color": _INK, "text.parse_math": False}):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _bars(left, "Task types", types)
        if targets:
            left.scatter(targets, range(len(targets)), s=300, marker="|", color=_ORANGE, linewidth=2.5, label="paper")
            left.legend(loc="lower right", frameon=False, handlelength=0.3, markerscale=0.6)
        _bars(right, "Query languages", shown, rest)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=200, facecolor="white", metadata=metadata)
    return paths


def _bars(axes, title: str, counts: dict[str, int], rest: list[tuple[str, int]] | None = None) -> None:
    """Draw one bar per count, the first on top, with its share in percent; `rest` is one grey bar below them."""
    total = sum(counts.values()) + sum(count for _, count in rest or ())
    labels = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…" for name in counts]
    shares = [100 * count / total for count in counts.values()]
    if rest:
        labels.append(f"{len(rest)} others")
        shares.append(100 * sum(count for _, count in rest) / total)
    colors = [_BLUE] * len(counts) + [_GREY] * bool(rest)
    bars = axes.barh(range(len(shares)), shares, color=colors, height=0.72)
    axes.bar_label(bars, fmt="{:.1f} %", padding=8, color=_INK)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(shares), _MIN_ROWS) - 0.5, -0.5)
    axes.set_title(f"{title} of {total:,} records", loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.margins(x=0.16)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
