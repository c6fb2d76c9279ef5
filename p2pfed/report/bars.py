"""One picture for the head of department: every hospital alone and together, as horizontal dots.

Colours are the Okabe-Ito set (distinguishable with colour-blindness), shapes differ as well, and
every line is labelled in place. The result is an SVG text without references to anything outside.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["accuracy_dots"]

# Okabe and Ito 2008, "Color Universal Design"; marker shapes repeat the distinction.
STYLES = (
    ("#999999", "o"),
    ("#0072B2", "D"),
    ("#009E73", "s"),
    ("#E69F00", "^"),
)


def accuracy_dots(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, title: str, subtitle: str
) -> str:
    """Draw one band of dots per row.

    Args:
        rows: Label and score by method, each from 0 to 1; all rows name the same methods.
        title: Said above the picture.
        subtitle: What is measured, in small print.

    Returns:
        A standalone SVG document.
    """
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(7.2, 1.4 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        methods = list(rows[0][1])
        for y, (_, scores) in enumerate(rows):
            axes.hlines(y, min(scores.values()), max(scores.values()), color="#dddddd", lw=2)
        for i, ((colour, marker), method) in enumerate(zip(STYLES, methods, strict=False)):
            places = [scores[method] for _, scores in rows]
            heights = [y + 0.16 * (i - (len(methods) - 1) / 2) for y in range(len(rows))]
            axes.scatter(places, heights, s=46, color=colour, marker=marker, label=method, zorder=3)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(subtitle)
        axes.grid(axis="x", color="#eeeeee")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, loc="left", fontsize=12, pad=28)
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), frameon=False, borderpad=0
        )
        legend.set_in_layout(False)  # it may be wider than the axes
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
