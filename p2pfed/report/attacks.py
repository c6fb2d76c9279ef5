"""Pictures of the audit's attacks: what a record looks like before and after the gate.

Map: `draw_pictures` (`inversion.png`: a task of pictures), `draw_records` (`records.png`: a
hospital's records as bars), `draw_membership` (`membership.png`: the attack's scores).

Invariant: the files can be read by their owner alone from the first byte on (0600), because they
show real records. Colours are the Okabe-Ito set; nothing is told by colour alone.

Not here: the attacks (the audit room); what they found is drawn as it comes.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from p2pfed.errors import ConfigError

__all__ = ["Played", "Recovered", "draw_membership", "draw_pictures", "draw_records"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"

LEAK_DB: Final = 3.0  # closer than the prior by more (half the squared error): marked
_MOST_PEOPLE = 6
_NARROWEST = 7.6  # inches: the explanation's lines fit
_HEAD = 1.35  # inches, for title and explanation


class Recovered(Protocol):
    """What the attacks recovered of each person by one variant; N people, F values each."""

    @property
    def guess(self) -> NDArray[np.float64]:
        """(N, F)."""
        ...

    @property
    def error(self) -> NDArray[np.float64]:
        """Root mean square error, (N,)."""
        ...

    @property
    def psnr(self) -> NDArray[np.float64]:
        """In dB, (N,)."""
        ...


class Played(Protocol):
    """Scores of a membership attack against one mechanism."""

    @property
    def mechanism(self) -> str:
        """By name."""
        ...

    @property
    def epsilon(self) -> float:
        """Claimed; infinite without privacy."""
        ...

    @property
    def inside(self) -> NDArray[np.float64]:
        """Scores with the target in."""
        ...

    @property
    def outside(self) -> NDArray[np.float64]:
        """Scores with the target out."""
        ...

    def rates(self) -> tuple[float, float]:
        """Right and false alarms at score 0."""
        ...


def draw_pictures(
    recovered: Mapping[str, Recovered], folder: Path, *, shape: tuple[int, int], epsilon: float
) -> Path:
    """Draw `inversion.png`: a row per variant, a column per person, PSNR under each.

    Args:
        recovered: By variant, from "original" to "prior".
        folder: Where to; must exist.
        shape: (height, width) of a picture with values from 0 to 1.
        epsilon: Of the whole run.

    Returns:
        The file written.

    Raises:
        ConfigError: It cannot be written.
    """
    people = min(_MOST_PEOPLE, len(recovered["original"].guess))
    figure = Figure(
        figsize=(max(_NARROWEST, 1.7 + 1.15 * people), _HEAD + 0.5 + 1.42 * len(recovered))
    )
    cells = _cells(figure, recovered, people, epsilon, left=1.6)
    for row, (variant, found) in enumerate(recovered.items()):
        for n in range(people):
            axes = cells[row, n]
            axes.imshow(found.guess[n].reshape(shape), cmap="gray_r", vmin=0, vmax=1)
            closer = found.psnr[n] - recovered["prior"].psnr[n]
            caption = "" if variant == "original" else f"{found.psnr[n]:.0f} dB"
            _frame(axes, caption, leaks=variant != "original" and closer > LEAK_DB)
    _title(
        figure,
        "What a person's update gives away: handwritten digits",
        "The best that two attacks get, by somebody who knows everyone else's data. The number:\n"
        "how close it is to the record (PSNR; more is closer). An orange frame and 'leak': more\n"
        f"than {LEAK_DB:g} dB closer than the last row, the mean of others, which needs no leak.",
    )
    return _save(figure, folder / "inversion.png")


def draw_records(
    recovered: Mapping[str, Recovered], folder: Path, *, task: str, epsilon: float
) -> Path:
    """Draw `records.png`: as `draw_pictures`, with every record as bars.

    Args:
        recovered: By variant, from "original" to "prior".
        folder: Where to; must exist.
        task: Whose records they are.
        epsilon: Of the whole run.

    Returns:
        The file written.

    Raises:
        ConfigError: It cannot be written.
    """
    people = min(4, len(recovered["original"].guess))
    figure = Figure(
        figsize=(max(_NARROWEST, 1.9 + 2.3 * people), _HEAD + 0.5 + 1.3 * len(recovered))
    )
    cells = _cells(figure, recovered, people, epsilon, left=1.7)
    truth = recovered["original"].guess
    width = truth.shape[1]
    most = float(np.abs(truth[:people]).max()) * 1.15
    for row, (variant, found) in enumerate(recovered.items()):
        for n in range(people):
            axes = cells[row, n]
            edges = np.arange(width + 1) - 0.5
            bars = np.clip(found.guess[n], -most, most)
            axes.bar(np.arange(width), bars, width=0.8, color=GREY if row == 0 else BLUE)
            if row:
                axes.stairs(truth[n], edges, color="black", lw=0.9, baseline=None)
            axes.axhline(0, color=GREY, lw=0.6)
            axes.set_xlim(-0.7, width - 0.3)
            axes.set_ylim(-most, most)
            closer = found.psnr[n] - recovered["prior"].psnr[n]
            caption = "" if variant == "original" else f"error {found.error[n]:.2f}"
            _frame(axes, caption, leaks=variant != "original" and closer > LEAK_DB)
    _title(
        figure,
        f"What a patient's update gives away: {task}, {width} measures per patient",
        "Bars: what an attacker recovers who knows everyone else's data. Black line: the true\n"
        "record. Error: root mean square, in units of the task's scale. An orange frame and\n"
        f"'leak': more than {LEAK_DB:g} dB closer than the last row (half the squared error),\n"
        "which is the mean of other patients and needs no leak.",
    )
    return _save(figure, folder / "records.png")


def draw_membership(games: Sequence[Played], folder: Path, *, task: str) -> Path:
    """Draw `membership.png`: histograms of the attack's score with and without the target.

    Args:
        games: Without privacy, then by mechanism and epsilon.
        folder: Where to; must exist.
        task: Whose patients were attacked.

    Returns:
        The file written.

    Raises:
        ConfigError: It cannot be written.
    """
    figure = Figure(figsize=(8.0, _HEAD + 2.2 * len(games)))
    panels = figure.subplots(len(games), 1, squeeze=False)[:, 0]
    for axes, game in zip(panels, games, strict=True):
        _histograms(axes, game)
    _title(
        figure,
        f"Was this patient in? The best attack on one release: {task}",
        "The target is the patient with the longest contribution. The attacker knows everyone\n"
        "else's data and the target's own, and says 'in' right of the dashed line. The more the\n"
        "two histograms lie on each other, the less a release tells.",
    )
    high = figure.get_figheight()
    figure.subplots_adjust(
        left=0.1, right=0.97, top=1 - (_HEAD + 0.2) / high, bottom=0.55 / high, hspace=0.65
    )
    return _save(figure, folder / "membership.png")


# --- parts -------------------------------------------------------------------------------------


def _cells(
    figure: Figure, recovered: Mapping[str, Any], people: int, epsilon: float, *, left: float
) -> Any:
    """Axes by [row, person], with a label before each row."""
    cells = figure.subplots(len(recovered), people, squeeze=False)
    wide, high = figure.get_size_inches()
    figure.subplots_adjust(
        left=left / wide,
        right=1 - 0.1 / wide,
        top=1 - _HEAD / high,
        bottom=0.35 / high,
        wspace=0.12,
        hspace=0.34,
    )
    for row, variant in enumerate(recovered):
        box = cells[row, 0].get_position()
        figure.text(
            0.12 / wide,
            (box.y0 + box.y1) / 2,
            _in_words(variant, epsilon),
            va="center",
            fontsize=10,
        )
    return cells


def _in_words(variant: str, epsilon: float) -> str:
    return {
        "original": "the record\nitself",
        "raw": "sent without\nthe gate",
        "largest tenth": "largest 10 %,\nwithout noise",
        "prior": "guessed,\nnothing sent",
    }.get(variant, f"{variant},\nwhole run\nat ε = {epsilon:g}")


def _frame(axes: Axes, caption: str, *, leaks: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(ORANGE if leaks else GREY)
        spine.set_linewidth(2.4 if leaks else 0.7)
    axes.set_xlabel(
        f"{caption}, leak" if leaks else caption,
        fontsize=9,
        labelpad=3,
        color=ORANGE if leaks else "black",
    )


def _histograms(axes: Axes, game: Played) -> None:
    low = min(game.inside.min(), game.outside.min())
    high = max(game.inside.max(), game.outside.max())
    room = 0.05 * (high - low)
    edges = np.linspace(low - room, high + room, 29).tolist()
    for scores, colour, label, hatch in (
        (game.outside, BLUE, "target out", ""),
        (game.inside, ORANGE, "target in", "///"),
    ):
        axes.hist(
            scores,
            edges,
            weights=np.full(len(scores), 1 / len(scores)),
            color=colour,
            alpha=0.55,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=label,
        )
        axes.hist(
            scores,
            edges,
            weights=np.full(len(scores), 1 / len(scores)),
            histtype="step",
            color=colour,
            linewidth=1.6,
        )
    axes.axvline(0, color="black", lw=1, ls="--")
    right, false = game.rates()
    private = math.isfinite(game.epsilon)
    gate = f"{game.mechanism}, ε = {game.epsilon:.3g} for one release" if private else "no privacy"
    axes.set_title(
        f"{gate}: {100 * right:.0f} % right alarms, {100 * false:.0f} % false ones",
        loc="left",
        fontsize=10,
    )
    axes.set_xlabel(
        "log-likelihood ratio of 'in' to 'out'"
        if private
        else "how much of the target's contribution is there (-0.5: nothing, 0.5: all)",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("share of releases", fontsize=9)
    corner = (1.0, 1.0) if private else (0.85, 1.0)  # there the last bar stands in the corner
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=corner)


def _title(figure: Figure, title: str, words: str) -> None:
    wide, high = figure.get_size_inches()
    left = 0.12 / wide
    figure.text(left, 1 - 0.12 / high, title, va="top", fontsize=12, weight="bold")
    figure.text(left, 1 - 0.42 / high, words, va="top", fontsize=9, linespacing=1.35)


def _save(figure: Figure, path: Path) -> Path:
    """Write a PNG whose mode is 0600 from the first byte on; it replaces an older one."""
    drawn = io.BytesIO()
    with mpl.rc_context({"font.family": "sans-serif", "hatch.linewidth": 0.6}):
        figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # is 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(drawn.getvalue())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}", error.strerror or str(error)) from error
    return path
