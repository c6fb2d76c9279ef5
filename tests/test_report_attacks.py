"""The pictures of the attacks: readable sizes, for their owner's eyes alone, marks where due."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from p2pfed.errors import ConfigError
from p2pfed.report import attacks

VARIANTS = ("original", "raw", "largest tenth", "gaussian", "svt", "prior")
DECIBELS = (120.0, 100.0, 20.0, 10.5, 9.0, 10.0)  # only the second and third are leaks


@dataclass
class Found:
    guess: np.ndarray
    psnr: np.ndarray

    @property
    def error(self):
        return 10 ** (-self.psnr / 20)


@dataclass
class Game:
    mechanism: str
    epsilon: float
    inside: np.ndarray
    outside: np.ndarray

    def rates(self):
        return float((self.inside > 0).mean()), float((self.outside > 0).mean())


def recovered(people=3, width=64):
    ramp = np.linspace(-1, 1, people * width).reshape(people, width)
    return {
        name: Found(ramp / (n + 1), np.full(people, decibels))
        for n, (name, decibels) in enumerate(zip(VARIANTS, DECIBELS, strict=True))
    }


def games(count):
    bell = np.sin(np.arange(300)) + np.cos(3 * np.arange(300))
    open_ = Game("none", math.inf, np.full(20, 0.5), np.full(20, -0.5))
    return [open_, *(Game("svt", 1.0 + n, bell + 0.1, bell - 0.1) for n in range(count))]


def size_of(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def draw_all(folder):
    return [
        attacks.draw_pictures(recovered(), folder, shape=(8, 8), epsilon=5.0),
        attacks.draw_records(recovered(width=13), folder, task="heart-disease", epsilon=5.0),
        attacks.draw_membership(games(2), folder, task="heart-disease"),
    ]


@pytest.fixture
def texts(monkeypatch):
    """All words of the figures that are written."""
    seen = []
    honest = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        honest(figure, *args, **options)
        seen.extend(t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text())

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return seen


@pytest.mark.slow
def test_three_pictures_of_a_size_that_a_page_and_a_screen_can_show(tmp_path):
    paths = draw_all(tmp_path)
    assert [p.name for p in paths] == ["inversion.png", "records.png", "membership.png"]
    for path in paths:
        assert all(500 <= side <= 1700 for side in size_of(path))


@pytest.mark.slow
def test_only_the_owner_can_read_them_even_where_an_open_one_was(tmp_path):
    old = tmp_path / "inversion.png"
    old.write_bytes(b"old")
    old.chmod(0o644)
    for path in draw_all(tmp_path):
        assert path.stat().st_mode & 0o777 == 0o600
    assert old.read_bytes() != b"old"
    assert len(list(tmp_path.iterdir())) == 3  # no partial file is left


@pytest.mark.slow
def test_what_is_closer_than_the_prior_is_called_a_leak_and_nothing_else(tmp_path, texts):
    attacks.draw_pictures(recovered(people=2), tmp_path, shape=(8, 8), epsilon=5.0)
    captions = [t for t in texts if "dB" in t and "\n" not in t]
    assert captions == (
        2 * ["100 dB, leak"] + 2 * ["20 dB, leak"] + 2 * ["10 dB"] + 2 * ["9 dB"] + 2 * ["10 dB"]
    )


@pytest.mark.slow
def test_each_row_says_in_words_what_was_sent(tmp_path, texts):
    attacks.draw_records(recovered(width=13), tmp_path, task="heart-disease", epsilon=5.0)
    words = " ".join(texts).replace("\n", " ")
    for label in (
        "the record itself",
        "sent without the gate",
        "largest 10 %, without noise",
        "gaussian, whole run at ε = 5",
        "svt, whole run at ε = 5",
        "guessed, nothing sent",
        "heart-disease, 13 measures per patient",
    ):
        assert label in words


@pytest.mark.slow
def test_each_game_has_its_rates_above_it(tmp_path, texts):
    attacks.draw_membership(games(1), tmp_path, task="breast-cancer")
    assert "no privacy: 100 % right alarms, 0 % false ones" in texts
    assert any(t.startswith("svt, ε = 1 for one release: ") for t in texts)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_told_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"missing/membership\.png"):
        attacks.draw_membership(games(1), tmp_path / "missing", task="x")


@pytest.mark.slow
def test_no_words_are_cut_off_at_the_edge(tmp_path, monkeypatch):
    """Every text of every figure lies inside the figure."""
    honest = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **options):
        honest(figure, *args, **options)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        wide, high = canvas.get_width_height()
        for text in figure.texts:
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0, text.get_text()
            assert box.x1 <= wide, text.get_text()
            assert box.y1 <= high, text.get_text()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    draw_all(tmp_path)
