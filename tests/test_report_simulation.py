"""The pictures of simulated runs: written, of a sensible size, even with little to show."""

from __future__ import annotations

import struct

import matplotlib.image
import numpy as np
import pytest

from p2pfed.report.simulation import draw_simulation

pytestmark = pytest.mark.slow


def seed(number: int, *, length: int = 40, scored: bool = False) -> dict:
    points = [
        {
            "t": 3.0 * t,
            "nodes": 5,
            "models": 1 + (t + number) % 3,
            "round_least": t // 3,
            "round_median": t // 2,
            "round_most": t // 2 + 1,
            "score_worst": 1 - 1 / (t + 2) if scored else None,
            "score_best": 1 - 1 / (t + 3) if scored else None,
            "bytes_per_round": 5000 - 10 * t,
            "fact_bytes_per_round": 900,
        }
        for t in range(length + number)
    ]
    coverage = [min(1.0, 0.2 * t) for t in range(1, 6 + number)]
    return {"seed": number, "points": points, "coverage": coverage}


def draw(folder, *seeds: dict) -> dict[str, tuple[int, int]]:
    """Draws and gives name -> (width, height), read from the PNG's header."""
    data = {"title": "Half and half", "gossip_interval_s": 1.0, "seeds": seeds}
    sizes = {}
    for path in draw_simulation(data, folder):
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        sizes[path.name] = struct.unpack(">II", head[16:])
        assert 3_000 < path.stat().st_size < 300_000
    return sizes


def test_three_pictures_of_a_size_that_a_page_and_a_screen_can_show(tmp_path):
    sizes = draw(tmp_path, *(seed(n) for n in range(3)))
    assert set(sizes) == {"consensus.png", "coverage.png", "bytes.png"}
    for width, height in sizes.values():
        assert 600 <= width <= 1600
        assert 400 <= height <= 1600


def test_a_training_that_can_be_scored_has_one_more_row(tmp_path):
    plain = draw(tmp_path, seed(0))["consensus.png"]
    scored = draw(tmp_path, seed(0, scored=True))["consensus.png"]
    assert scored[1] > plain[1]


def test_the_curves_are_drawn_in_their_colours(tmp_path):
    draw(tmp_path, seed(0), seed(1))
    pixels = (matplotlib.image.imread(tmp_path / "bytes.png")[..., :3] * 255).round()
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - colour).max(axis=2) < 4).sum() > 200


def test_one_point_no_seed_and_a_seed_that_broke_at_once_can_be_drawn(tmp_path):
    nothing = {"seed": 1, "points": [], "coverage": []}
    for seeds in ((seed(0, length=1),), (), (nothing,), (nothing, seed(0))):
        assert len(draw(tmp_path, *seeds)) == 3


def test_the_same_result_gives_the_same_files(tmp_path):
    said = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw(tmp_path / name, seed(0), seed(1))
        said.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert said[0] == said[1]
