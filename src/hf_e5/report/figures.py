"""Figure 2 of the paper for any set of records: shares of task types and of languages."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, radians, sin
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..errors import InputError
from ..languages import load_languages


# As many languages as the paper names; the rest is one slice.
MAX_LANGUAGES = 14

# One hue per task type, from the colour-blind-safe palette of Okabe and Ito.
_TASK_COLORS = {
    "short_long": "#0072B2",
    "long_short": "#E69F00",
    "sts": "#009E73",
    "bitext": "#CC79A7",
    "long_long": "#56B4E9",
    "short_short": "#D55E00",
}
_OTHER_COLOR = "#B8BEC6"
_INK, _MUTED = "#1F2933", "#52606D"


def plot_shares(task_types: Mapping[str, int], languages: Mapping[str, int], stem: str | Path) -> list[Path]:
    """Draw both shares side by side and write `stem`.png and `stem`.svg.

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
    except ImportError:
        raise InputError("figures need matplotlib: pip install hf-e5[synthesis]") from None

    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    # A fixed salt makes two runs give the same file.
    with rc_context({"svg.hashsalt": "hf-e5", "font.family": "DejaVu Sans", "font.size": 12}):
        figure = Figure(figsize=(13, 5), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        total = sum(task_types.values())
        _donut(left, sorted(task_types.items(), key=lambda item: -item[1]), "Task types", total)
        _donut(right, _top_languages(languages), "Languages", sum(languages.values()))
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)
    return paths


def _top_languages(languages: Mapping[str, int]) -> list[tuple[str, int]]:
    names = load_languages()
    ranked = sorted(languages.items(), key=lambda item: -item[1])
    shown = [(names[code].name if code in names else code, count) for code, count in ranked[:MAX_LANGUAGES]]
    rest = ranked[MAX_LANGUAGES:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    return shown


def _donut(axes, shares: list[tuple[str, int]], title: str, total: int) -> None:
    from matplotlib import colormaps

    if title == "Task types":
        colors: list[Any] = [_TASK_COLORS.get(name, _OTHER_COLOR) for name, _ in shares]
    else:
        ramp = colormaps["viridis"]
        colors = [ramp(0.12 + 0.76 * position / max(len(shares) - 1, 1)) for position in range(len(shares))]
        if shares and shares[-1][0].endswith(" others"):
            colors[-1] = _OTHER_COLOR
    wedges, _ = axes.pie(
        [count for _, count in shares],
        colors=colors,
        startangle=90,
        counterclock=False,
        radius=1,
        wedgeprops={"width": 0.42, "edgecolor": "white", "linewidth": 1.5},
    )
    axes.set(xlim=(-2.15, 2.15), ylim=(-1.3, 1.2))
    axes.text(0, 0.08, f"{total:,}", ha="center", va="center", fontsize=21, fontweight="bold", color=_INK)
    axes.text(0, -0.16, "records", ha="center", va="center", fontsize=11, color=_MUTED)
    axes.set_title(title, fontsize=15, fontweight="bold", color=_INK, pad=6)
    _label(axes, wedges, shares, total)


def _label(axes, wedges, shares: list[tuple[str, int]], total: int) -> None:
    """Put name and share beside each wedge, joined by a line; labels on one side are spread so that none overlap."""
    sides: dict[int, list[list]] = {1: [], -1: []}
    for wedge, (name, count) in zip(wedges, shares, strict=True):
        angle = radians((wedge.theta1 + wedge.theta2) / 2)
        text = f"{shorten(name, 24)}  {count / max(total, 1):.1%}"
        sides[1 if cos(angle) >= 0 else -1].append([sin(angle) * 1.12, angle, text])
    for side, labels in sides.items():
        labels.sort(key=lambda label: -label[0])
        for height, (_, angle, text) in zip(_spread([label[0] for label in labels]), labels, strict=True):
            axes.annotate(
                text,
                xy=(cos(angle), sin(angle)),
                xytext=(1.2 * side, height),
                ha="left" if side > 0 else "right",
                va="center",
                color=_INK,
                arrowprops={
                    "arrowstyle": "-",
                    "color": _OTHER_COLOR,
                    "linewidth": 0.9,
                    "shrinkA": 2,
                    "shrinkB": 0,
                    "relpos": (0 if side > 0 else 1, 0.5),
                },
            )


def _spread(heights: list[float], gap: float = 0.17) -> list[float]:
    """Move descending heights apart to at least `gap`, keeping their order and their middle."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    if not placed:
        return placed
    shift = (sum(heights) - sum(placed)) / len(placed)
    return [height + shift for height in placed]
