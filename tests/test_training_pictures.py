"""The stacks of slices that a dashboard moves through."""

from __future__ import annotations

import base64

import numpy as np

from p2pfed.training.pictures import Picture, stacks
from p2pfed.training.record import pictures_as_json


def a_picture(shape, marked):
    image = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape).astype(np.uint8)
    target, predicted = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    target[marked] = 1
    return Picture("case", 0.5, image, target, predicted, (1.0, 1.0, 2.0))


def test_a_stack_covers_what_is_marked_and_no_more():
    picture = a_picture((10, 12, 14), np.s_[2:5, 3:9, 6:7])
    found = stacks(picture)
    assert {name: len(of) for name, of in found.items()} == {
        "sagittal": 3,
        "coronal": 6,
        "axial": 1,
    }
    for i, one in enumerate(found["sagittal"]):
        assert np.array_equal(one["image"], picture.image[2 + i])
    assert found["axial"][0]["target"].sum() == 3 * 6


def test_a_case_where_nothing_is_marked_shows_the_whole():
    assert len(stacks(a_picture((4, 5, 6), np.s_[0:0]))["axial"]) == 6


def test_a_large_case_has_fewer_slices():
    found = stacks(a_picture((300, 300, 40), np.s_[:, :, :]))
    assert len(found["axial"]) == 600_000 // 90_000
    assert len(found["sagittal"]) == 25


def test_the_private_socket_gives_the_stack_beside_the_middle_slice():
    plane = pictures_as_json([a_picture((4, 5, 6), np.s_[1:3, 1:3, 1:3])])["best"]["planes"][
        "axial"
    ]
    assert plane["image"]["shape"] == plane["stack"][0]["image"]["shape"] == [4, 5]
    assert len(base64.b64decode(plane["stack"][1]["predicted"]["data"])) == 20
