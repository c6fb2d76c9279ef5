"""The stacks of slices that a dashboard moves through."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np

from p2pfed.training.pictures import Picture, slices, stacks
from p2pfed.training.record import pictures_as_json


def a_picture(shape, marked):
    image = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape).astype(np.uint8)
    target, predicted = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    target[marked] = 1
    return Picture("case", 0.5, image, target, predicted, (1.0, 1.0, 2.0))


def test_a_stack_covers_what_is_marked_and_no_more():
    picture = a_picture((10, 12, 14), np.s_[2:5, 3:9, 6:7])
    found = stacks(picture)
    assert {name: len(of.slices) for name, of in found.items()} == {
        "sagittal": 3,
        "coronal": 6,
        "axial": 1,
    }
    for i, one in enumerate(found["sagittal"].slices):
        assert np.array_equal(one["image"], picture.image[2 + i])
    assert found["axial"].slices[0]["target"].sum() == 3 * 6


def test_a_case_where_nothing_is_marked_shows_the_whole():
    assert len(stacks(a_picture((4, 5, 6), np.s_[0:0]))["axial"].slices) == 6


def test_a_large_case_has_fewer_slices():
    found = stacks(a_picture((300, 300, 40), np.s_[:, :, :]))
    assert len(found["axial"].slices) == 600_000 // 90_000
    assert len(found["sagittal"].slices) == 25


def test_a_model_that_marks_something_far_off_does_not_move_the_middle_away_from_the_structure():
    picture = a_picture((40, 60, 50), np.s_[2:5, 3:9, 4:7])
    picture.predicted[39, 59, 49] = 1
    for stack in stacks(picture).values():
        assert stack.slices[stack.middle]["target"].any()
        assert len(stack.slices) == 25


def test_the_middle_of_a_structure_in_two_pieces_is_in_one_of_them():
    picture = a_picture((9, 9, 30), np.s_[4, 4, (2, 3, 26)])
    assert all(parts["target"].any() for parts in slices(picture).values())


def test_the_slices_of_a_stack_are_in_order_and_none_is_there_twice():
    picture = a_picture((9, 9, 200), np.s_[2:7, 2:7, 3:190])
    picture.target[4, 4, 11:14] = 1
    depths = [int(one["image"][0, 0]) for one in stacks(_numbered(picture))["axial"].slices]
    assert depths == sorted(set(depths))
    assert (depths[0], depths[-1]) == (3, 189)


def _numbered(picture):
    """The same with its height as its grey value."""
    heights = np.broadcast_to(np.arange(picture.image.shape[2]), picture.image.shape)
    return replace(picture, image=heights.astype(np.uint8))


def test_the_private_socket_gives_the_stack_beside_the_middle_slice():
    plane = pictures_as_json([a_picture((4, 5, 6), np.s_[1:3, 1:3, 1:3])])["best"]["planes"][
        "axial"
    ]
    assert plane["image"]["shape"] == plane["stack"][0]["image"]["shape"] == [4, 5]
    assert len(base64.b64decode(plane["stack"][1]["predicted"]["data"])) == 20
    assert plane["stack"][plane["middle"]]["image"] == plane["image"]
