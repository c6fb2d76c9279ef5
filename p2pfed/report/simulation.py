"""Three pictures of simulated runs: consensus, coverage, bytes; one line per seed and their median.

Colours are the Okabe-Ito set (distinguishable with colour-blindness); single seeds are thin and
grey, what the reader should look at is thick, coloured, and of its own line style.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_simulation"]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def draw_simulation(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `consensus.png`, `coverage.png` and `bytes.png`.

    Args:
        data: The JSON result of `p2pfed simulate`: `title`, `gossip_interval_s` and `seeds`, each
            with `points` and `coverage`.
        folder: Where to; must exist.

    Returns:
        The files written.
    """
    seeds = [seed for seed in data["seeds"] if seed["points"]]
    pictures = {"consensus": _consensus, "coverage": _coverage, "bytes": _bytes}
    written = []
    for name, draw in pictures.items():
        with mpl.rc_context({"font.family": "sans-serif", "font.size": 10}):
            figure = draw(seeds, data)
            figure.suptitle(f"{data['title']} ({len(seeds)} seeds)", x=0.01, ha="left", fontsize=12)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, metadata={"Software": None})
            written.append(path)
    return written


def _figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.2, 2.0 + 2.2 * rows), layout="constrained")
    made = figure.subplots(rows, 1, sharex=True, squeeze=False)
    axes = [made[i][0] for i in range(rows)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#eeeeee")
    return figure, axes


def _lines(
    axes: Axes,
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    """Every curve thin, and the median over the curves thick."""
    for x, y in curves:
        axes.plot(x, y, color=GREY, lw=0.6, alpha=0.5)
    length = max((len(x) for x, _ in curves), default=0)
    if not length:
        return
    longest = next(x for x, _ in curves if len(x) == length)
    median = [statistics.median(y[min(i, len(y) - 1)] for _, y in curves) for i in range(length)]
    axes.plot(longest, median, color=colour, lw=2.2, ls=style, label=label)


def _legend(axes: Axes) -> None:
    """Above the axes: curves that end in one point would hide labels in place."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, handlelength=2.6
        )


def _over_time(
    seeds: Sequence[Mapping[str, Any]], key: str
) -> list[tuple[list[float], list[float]]]:
    curves = []
    for seed in seeds:
        points = [p for p in seed["points"] if p[key] is not None]
        if points:
            curves.append(([p["t"] / 60 for p in points], [float(p[key]) for p in points]))
    return curves


def _consensus(seeds: Sequence[Mapping[str, Any]], _data: Mapping[str, Any]) -> Figure:
    scored = _over_time(seeds, "score_best")
    figure, axes = _figure(3 if scored else 2)
    _lines(axes[0], _over_time(seeds, "models"), colour=BLUE, label="different models")
    axes[0].set_ylabel("models held\nby honest nodes")
    axes[0].set_ylim(bottom=0)
    for key, colour, style in (
        ("round_most", GREEN, "-"),
        ("round_median", BLUE, "--"),
        ("round_least", ORANGE, ":"),
    ):
        label = {"most": "first node", "median": "median node", "least": "last node"}[key[6:]]
        _lines(axes[1], _over_time(seeds, key), colour=colour, label=label, style=style)
    axes[1].set_ylabel("round")
    if scored:
        _lines(axes[2], scored, colour=GREEN, label="best node")
        _lines(
            axes[2],
            _over_time(seeds, "score_worst"),
            colour=ORANGE,
            label="worst node",
            style="--",
        )
        axes[2].set_ylabel("score of the model")
    axes[-1].set_xlabel("simulated time, minutes")
    for one in axes:
        _legend(one)
    return figure


def _coverage(seeds: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> Figure:
    figure, [axes] = _figure()
    curves: list[tuple[list[float], list[float]]] = [
        ([float(i + 1) for i in range(len(seed["coverage"]))], list(seed["coverage"]))
        for seed in seeds
    ]
    _lines(axes, curves, colour=BLUE, label="median seed")
    axes.set_ylim(0, 1.05)
    if max((len(x) for x, _ in curves), default=0) > 40:
        axes.set_xscale("log")
    axes.set_xlabel(f"gossip intervals ({data['gossip_interval_s']:g} s) since the release")
    axes.set_ylabel("deltas held by the nodes\nstarted before the release")
    _legend(axes)
    return figure


def _bytes(seeds: Sequence[Mapping[str, Any]], _data: Mapping[str, Any]) -> Figure:
    figure, [axes] = _figure()
    for key, colour, style, label in (
        ("bytes_per_round", BLUE, "-", "everything"),
        ("fact_bytes_per_round", ORANGE, "--", "deltas, rosters, proofs"),
    ):
        curves = [(x, [v / 1000 for v in y]) for x, y in _over_time(seeds, key)]
        _lines(axes, curves, colour=colour, label=label, style=style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("simulated time, minutes")
    axes.set_ylabel("kB received per node and\nround so far (median node)")
    _legend(axes)
    return figure
