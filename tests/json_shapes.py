"""Shapes of JSON: field -> type, nested, without values; and whether a value has one.

A shape is a type's name ("string", "integer", "number", "boolean", "null", or several with | in
between), a list of one shape (and "null", where null may stand in its place), or an object of
shapes. In an object the key "?" says that null may
stand in its place, a key that ends with ? may be missing, and "*" stands for all keys: they are
data. An integer is a number.
"""

from __future__ import annotations

from typing import Any

Shape = Any

# objects whose keys are data: names of measures, of hospitals, of steps
FREE = {"deltas", "gate", "metrics", "none", "options", "progress", "seconds", "values"}
_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def shape_of(value: Any, key: str = "") -> Shape:
    """The shape that a value has."""
    if isinstance(value, dict):
        shapes = {name: shape_of(item, name) for name, item in value.items()}
        if key in FREE and not any(isinstance(item, list) for item in value.values()):
            merged: Shape = None
            for shape in shapes.values():
                merged = shape if merged is None else merge(merged, shape, new=True)
            return {"*": merged} if shapes else {}
        return shapes
    if isinstance(value, list):
        merged = None
        for item in value:
            merged = shape_of(item) if merged is None else merge(merged, shape_of(item), new=True)
        return [] if merged is None else [merged]
    return _NAMES[type(value)]


def merge(pinned: Shape, found: Shape, *, new: bool = False) -> Shape:
    """`pinned`, widened by what may be added without notice: fields, and null either way.

    Args:
        pinned: What is written.
        found: What was seen.
        new: Both are items of one list seen for the first time: fields may be missing in either.
    """
    if isinstance(pinned, dict) and isinstance(found, dict):
        return _merged_objects(pinned, found, new=new)
    if isinstance(pinned, list) and isinstance(found, list):
        if not (pinned and found):
            return pinned or found
        return [merge(pinned[0], found[0], new=new), *pinned[1:]]
    if isinstance(pinned, dict) and found == "null":
        return {"?": "null", **pinned}
    if isinstance(found, dict) and pinned == "null":
        return {"?": "null", **found}
    if isinstance(pinned, str) and isinstance(found, str):
        words = [*pinned.split("|"), *found.split("|")]
        if new or "null" in words:
            return "|".join(dict.fromkeys(words))
    return pinned


def _merged_objects(pinned: dict[str, Shape], found: dict[str, Shape], *, new: bool) -> Shape:
    known = {key.removesuffix("?"): key for key in pinned if key != "?"}
    merged = dict(pinned)
    for key, shape in found.items():
        if key in known:
            merged[known[key]] = merge(merged[known[key]], shape, new=new)
        elif "*" not in pinned:
            merged[f"{key}?" if new and key != "*" else key] = shape
    if new:
        missing = [key for key in pinned if key.removesuffix("?") not in found]
        merged |= {f"{key}?": merged.pop(key) for key in missing if key[-1:] not in {"?", "*"}}
    return merged


def complaints(shape: Shape, value: Any, where: str = "data") -> list[str]:
    """What is wrong with a value, given its pinned shape; nothing where it fits."""
    if isinstance(shape, dict):
        return _of_object(shape, value, where)
    if isinstance(shape, list):
        if value is None and "null" in shape:
            return []
        if not isinstance(value, list):
            return [f"{where} is no list any more"]
        if value and not shape:
            return [f"{where} holds something now: pin it"]
        return [
            c for i, item in enumerate(value) for c in complaints(shape[0], item, f"{where}[{i}]")
        ]
    name = _NAMES.get(type(value), "object or list")
    allowed = shape.split("|")
    if name in allowed or (name == "integer" and "number" in allowed):
        return []
    return [f"{where} was {shape}, now {name}"]


def _of_object(shape: dict[str, Shape], value: Any, where: str) -> list[str]:
    if value is None and "?" in shape:
        return []
    if not isinstance(value, dict):
        return [f"{where} is no object any more"]
    if "*" in shape:
        return [
            c for k, item in value.items() for c in complaints(shape["*"], item, f"{where}.{k}")
        ]
    found = []
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name and name in value:
            found += complaints(inner, value[name], f"{where}.{name}")
        elif name and not key.endswith("?"):
            found.append(f"{where}.{name} has disappeared")
    known = {key.removesuffix("?") for key in shape}
    found += [f"{where}.{key} is new: pin it" for key in value if key not in known]
    return found
