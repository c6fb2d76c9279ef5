"""Three-plane pictures: what lies where, to which scale, and who may read the files."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from p2pfed.errors import ConfigError, VersionMismatch
from p2pfed.report.three_planes import EDGES, EXPERT, MODEL, draw_pictures, on_screen
from p2pfed.training.pictures import Picture, slices
from p2pfed.training.record import pictures_as_json

SHAPE = (12, 20, 16)
SIDES = {"R": (0, -1), "L": (0, 0), "A": (1, -1), "P": (1, 0), "S": (2, -1), "I": (2, 0)}


def picture(case: str = "case_1", score: float = 0.9, spacing=(1.0, 1.0, 1.0)) -> Picture:
    image = np.full(SHAPE, 90, np.uint8)
    target, predicted = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    target[3:8, 5:15, 4:12] = 1
    predicted[4:9, 6:15, 4:11] = 1
    return Picture(case, score, image, target, predicted, spacing)


def three(**how) -> dict:
    return pictures_as_json([picture(f"case_{n}", score=0.9 - n / 10, **how) for n in range(3)])


def near(image: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels have about this colour."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (np.abs(image[..., :3] - wanted) < 0.08).all(axis=-1)


@pytest.mark.parametrize("plane", EDGES)
def test_the_letters_on_the_edges_are_where_the_patient_is(plane):
    for letter, edge in zip(EDGES[plane], ("left", "right", "top", "bottom"), strict=True):
        axis, end = SIDES[letter]
        marked = np.zeros(SHAPE, np.uint8)
        at = [slice(None)] * 3
        at[axis] = end
        marked[tuple(at)] = 255  # the whole face of the volume on that side of the patient
        whole = Picture("", 0, marked, np.ones_like(marked), marked, (1, 1, 1))
        shown = on_screen(slices(whole)[plane]["image"])
        seen = {
            "left": shown[:, 0],
            "right": shown[:, -1],
            "top": shown[0],
            "bottom": shown[-1],
        }
        assert seen[edge].all(), (plane, letter)
        assert not shown.all()


@pytest.mark.slow
def test_there_is_a_file_per_case_and_a_sheet_that_only_the_owner_may_read(tmp_path):
    written = draw_pictures(three(), tmp_path / "pictures", score="dice")
    assert [p.name for p in written] == ["best.png", "median.png", "worst.png", "sheet.png"]
    assert stat.S_IMODE((tmp_path / "pictures").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in written} == {0o600}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


@pytest.mark.slow
def test_the_sheet_is_all_cases_below_each_other(tmp_path):
    *cases, sheet = draw_pictures(three(), tmp_path / "pictures")
    one, all_ = imread(cases[0]), imread(sheet)
    assert all_.shape[1] == one.shape[1]
    assert all_.shape[0] > 2.5 * one.shape[0]


@pytest.mark.slow
def test_planes_are_drawn_to_scale(tmp_path):
    """Voxels of 3 mm from foot to head make sagittal and coronal pictures three times as high."""
    widths = {}
    for name, spacing in (("even", (1.0, 1.0, 1.0)), ("tall", (1.0, 1.0, 3.0))):
        shown = {"best": pictures_as_json([picture(spacing=spacing)])["best"]}
        grey = np.abs(imread(draw_pictures(shown, tmp_path / name)[0])[..., :3] - 90 / 255) < 0.02
        grey = grey.all(axis=-1)
        columns = np.flatnonzero(grey.mean(axis=0) > 0.1)
        gaps = np.flatnonzero(np.diff(columns) > 5)
        sagittal = columns[: gaps[0] + 1]
        rows = np.flatnonzero(grey[:, sagittal].mean(axis=1) > 0.1)  # letters are no rows
        widths[name] = (rows[-1] - rows[0]) / (sagittal[-1] - sagittal[0])
    assert widths["even"] == pytest.approx(16 / 20, rel=0.03)
    assert widths["tall"] == pytest.approx(3 * 16 / 20, rel=0.03)


@pytest.mark.slow
def test_expert_and_model_are_outlined_in_their_colours_where_they_are(tmp_path):
    shown = pictures_as_json([picture()])
    empty = pictures_as_json(
        [Picture("e", 0, *(np.zeros(SHAPE, np.uint8) for _ in "123"), (1, 1, 1))]
    )
    drawn = imread(draw_pictures({"best": shown["best"]}, tmp_path / "both")[0])
    blank = imread(draw_pictures({"best": empty["best"]}, tmp_path / "none")[0])
    for colour in (EXPERT, MODEL):
        assert near(drawn, colour).sum() > 3 * near(blank, colour).sum() > 0  # the legend is there


@pytest.mark.slow
def test_a_structure_that_fills_the_slice_is_outlined_too(tmp_path):
    full = Picture("f", 1, *(np.ones(SHAPE, np.uint8) for _ in "123"), (1, 1, 1))
    assert len(draw_pictures(pictures_as_json([full]), tmp_path / "full")) == 4


@pytest.mark.slow
def test_a_name_is_shown_as_it_is_whatever_is_in_it(tmp_path):
    named = Picture(
        "$\\frac{1}{0}$ \x1b[2J" + "x" * 500, 0.5, *(np.ones(SHAPE, np.uint8),) * 3, (1, 1, 1)
    )
    drawn = draw_pictures(pictures_as_json([named]), tmp_path / "named")
    assert imread(drawn[0]).shape[1] < 1400


@pytest.mark.parametrize(
    "damage",
    [
        lambda case: case.pop("planes"),
        lambda case: case["planes"].pop("axial"),
        lambda case: case["planes"]["axial"]["image"].update(data="!"),
        lambda case: case["planes"]["axial"]["image"].update(shape=[3, 3]),
        lambda case: case["planes"]["axial"].update(spacing=[1, 0]),
        lambda case: case["planes"]["axial"].update(image=case["planes"]["coronal"]["image"]),
        lambda case: case.update(score="high"),
    ],
)
def test_pictures_of_another_form_are_refused_and_nothing_is_made(tmp_path, damage):
    shown = three()
    damage(shown["worst"])
    with pytest.raises(VersionMismatch, match="not of the form"):
        draw_pictures(shown, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


@pytest.mark.slow
def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        draw_pictures(three(), tmp_path)
    with pytest.raises(ConfigError, match="cannot write"):
        draw_pictures(three(), Path("/dev/null/x"))
