"""What a shape of JSON says of a value, and how a pinned one is widened."""

from __future__ import annotations

import pytest
from json_shapes import complaints, merge, shape_of


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        ({"a": "integer"}, {"a": 1}, []),
        ({"a": "number"}, {"a": 1}, []),
        ({"a": "integer"}, {"a": 1.5}, ["data.a was integer, now number"]),
        ({"a": "integer"}, {"a": True}, ["data.a was integer, now boolean"]),
        ({"a": "integer"}, {}, ["data.a has disappeared"]),
        ({"a?": "integer"}, {}, []),
        ({"a": "integer|null"}, {"a": None}, []),
        ({"a": "integer"}, {"a": None}, ["data.a was integer, now null"]),
        ({}, {"b": 1}, ["data.b is new: pin it"]),
        ({"?": "null", "a": "string"}, None, []),
        ({"a": "string"}, None, ["data is no object any more"]),
        ([{"a": "string"}], [{"a": "x"}, {}], ["data[1].a has disappeared"]),
        (["string"], "x", ["data is no list any more"]),
        ([], ["x"], ["data holds something now: pin it"]),
        ({"*": "number"}, {"x": 1, "y": "z"}, ["data.y was number, now string"]),
        ("string", {"a": 1}, ["data was string, now object or list"]),
    ],
)
def test_a_value_that_changed_its_shape_is_told(shape, value, said):
    assert complaints(shape, value) == said


def test_a_pin_is_widened_by_fields_and_by_null_and_by_nothing_else():
    assert merge({"a": "string"}, {"a": "null", "b": "integer"}) == {
        "a": "string|null",
        "b": "integer",
    }
    assert merge({"a": "string"}, {"a": "integer"}) == {"a": "string"}
    assert merge({"a": {"b": "string"}}, {"a": "null"}) == {"a": {"?": "null", "b": "string"}}
    assert merge({"a": "string", "b": "string"}, {"a": "string"}) == {"a": "string", "b": "string"}
    assert shape_of([{"a": 1, "b": 1}, {"a": 2.0}]) == [{"a": "integer|number", "b?": "integer"}]
    assert shape_of({"values": {"dice": 0.5, "auc": 1.0}}) == {"values": {"*": "number"}}


def test_keys_that_are_data_are_not_pinned_and_lists_are_no_data():
    assert shape_of({"gate": {"Oslo": {"a": 1}}}) == {"gate": {"*": {"a": "integer"}}}
    assert shape_of({"metrics": {"metrics": [1.5]}}) == {"metrics": {"metrics": ["number"]}}
