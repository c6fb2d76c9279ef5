"""docs/protocol.md against the code: constants, kinds of messages, the example, the vectors."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from math import isqrt
from pathlib import Path

import numpy as np
import pytest
from consortium import Consortium
from protocol_vectors import GENESIS, WEIGHTED, fold_example, vectors

from p2pfed.errors import FactRejected
from p2pfed.gossip import guard
from p2pfed.gossip.committee import Committees
from p2pfed.identity.rules import Averaging
from p2pfed.identity.run import Run
from p2pfed.wire import messages
from p2pfed.wire.versions import VERSIONS

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "protocol.md").read_text("utf-8")


def section(number: int) -> str:
    """The text of one section."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group()


def constants() -> list[tuple[str, str]]:
    """(value as it is written, path in the package) of section 10."""
    rows = re.findall(r"^\| .+? \| ([\d.,]+) \| `([\w.]+)` \|$", section(10), re.MULTILINE)
    return [(value.replace(",", ""), path) for value, path in rows]


def value_of(path: str) -> float:
    """A constant of a module, or the default of a field."""
    place, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(f"p2pfed.{place}"), name)
    except ModuleNotFoundError:
        module, owner = place.rsplit(".", 1)
        kind = getattr(importlib.import_module(f"p2pfed.{module}"), owner)
        return kind.__dataclass_fields__[name].default


@pytest.mark.parametrize(("value", "path"), constants())
def test_a_constant_is_what_the_code_has(value, path):
    assert float(value) == value_of(path)


def test_all_limits_of_messages_are_written_down():
    paths = {path for _, path in constants()}
    assert len(paths) == len(constants()) > 50
    for module in ("wire.codec", "wire.beat", "wire.measure", "wire.messages", "wire.spreading"):
        names = vars(importlib.import_module(f"p2pfed.{module}"))
        limits = {f"{module}.{name}" for name in names if re.fullmatch(r"MAX_[A-Z_]+", name)}
        elsewhere = {limit for limit in limits if limit.endswith(("MAX_ROUND", "MAX_HEADER"))}
        known = {path.rsplit(".", 1)[1] for path in paths}
        assert {
            limit for limit in limits - elsewhere if limit.rsplit(".", 1)[1] not in known
        } == set()


def test_every_kind_of_message_has_its_row_and_no_other_has_one():
    rows = re.findall(r"^\| `([a-z-]+)` \|", section(6) + section(8), re.MULTILINE)
    assert sorted(rows) == sorted({"beat", *messages._READERS})


def test_every_version_that_is_spoken_has_its_row():
    rows = re.findall(r"^\| version (\d+) \|", section(9), re.MULTILINE)
    assert tuple(map(int, rows)) == VERSIONS


def test_the_test_vectors_are_what_the_code_gives():
    (block,) = re.findall(r"^```vectors\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert dict(line.split(": ") for line in block.splitlines()) == vectors()


def test_the_worked_example_is_what_the_arithmetic_and_the_code_give():
    (block,) = re.findall(r"^```text\n(start .*?)^```", section(11), re.MULTILINE | re.DOTALL)
    written = [list(map(int, line.split("= ")[-1].split())) for line in block.splitlines()]
    start, norms, (med,), (f1,), (f2,), coefficients, (whole,), sums, step, model = written
    dense = np.zeros((2, 4), np.int64)
    for row, each in zip(dense, WEIGHTED, strict=True):
        row[each.payload.indices] = each.payload.values
    weights = [each.weight for each in WEIGHTED]
    assert start == np.rint(GENESIS * 4096).astype(int).tolist()
    assert norms == (dense**2).sum(axis=1).tolist()
    assert med == min(norms)
    assert f1 == isqrt(med * 2**32 // norms[0])
    assert f2 == 1 << 16
    assert coefficients == [weights[0] * f1, weights[1] * f2]
    assert whole == (1 << 16) * sum(weights)
    assert sums == (np.array(coefficients) @ dense).tolist()
    assert step == [round(s / whole) for s in sums]
    assert model == [a + b for a, b in zip(start, step, strict=True)]
    mixture, state = fold_example()
    assert (list(mixture.coefficients), mixture.total) == (coefficients, whole)
    assert state.model.tolist() == model


def bounds() -> list[tuple[str, str, str]]:
    """(key, least, most) of the run file's bounds in section 1."""
    return re.findall(r"^\| `([\w.]+)` \| ([\d.]+) \| ([\d.]+) \|$", section(1), re.MULTILINE)


def refused(key: str, value: float) -> bool:
    """Whether a run file is refused because of this value, whatever else may be said of it."""
    data = json.loads(Consortium(2).run_draft().encode())
    owner, _, name = key.rpartition(".")
    place = data[owner][0] if owner else data
    in_quotes = isinstance(place[name], str)
    place[name] = repr(float(value)) if in_quotes else value
    try:
        Run.decode(json.dumps(data).encode())
    except FactRejected as error:
        return f"{name} is" in error.what and "expected" in error.why
    return False


def number(text: str) -> float:
    return float(text) if "." in text else int(text)


@pytest.mark.parametrize(("key", "least", "most"), bounds())
def test_a_run_file_is_refused_beyond_the_bounds_and_not_at_them(key, least, most):
    low, high = number(least), number(most)
    assert not refused(key, low)
    assert not refused(key, high)
    assert refused(key, high + 1)
    assert refused(key, 0 if low > 0 else -1)


def test_all_numbers_of_a_run_file_have_their_bounds_written_down():
    data = json.loads(Consortium(2).run_draft().encode())
    places = {"": data, **{k: v[0] for k, v in data.items() if isinstance(v, list)}}
    keys = {
        f"{owner}.{name}".lstrip(".")
        for owner, place in places.items()
        for name, value in place.items()
        if type(value) in {int, float} or (isinstance(value, str) and value[:1].isdigit())
    }
    assert keys - {"network_id", "task_id", "genesis"} == {key for key, _, _ in bounds()}


def test_every_limit_of_questions_is_written_down_as_the_code_has_it():
    rows = re.findall(r"^\| [\w, ]+ \| (\d+) \| ([\d.]+) \| (`.+`) \|$", section(6), re.MULTILINE)
    written = {
        kind: (float(burst), float(per_second))
        for burst, per_second, kinds in rows
        for kind in re.findall(r"`([a-z-]+)`", kinds)
    }
    coded = {
        re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower(): (rate.burst, rate.per_second)
        for kind, rate in guard._RATES.items()
    }
    assert written.keys() == coded.keys()
    for kind, (burst, per_second) in written.items():
        assert (burst, per_second) == pytest.approx(coded[kind], rel=0.01), kind


def test_a_committee_is_drawn_as_the_document_says():
    net = Consortium(5)
    run = net.run(averaging=Averaging(committee=2))
    committees = Committees(run)
    for round_ in range(20):
        start = run.run_id + round_.to_bytes(8, "little")
        lots = {
            hashlib.blake2b(
                start + member.peer_id.encode(), digest_size=16, person=b"p2pfed-seat"
            ).digest(): member.peer_id
            for member in net.roster.members
        }
        lowest = {lots[lot] for lot in sorted(lots)[:2]}
        assert committees.of(net.roster, round_) == lowest


def test_the_chain_is_hashed_as_the_document_says():
    net = Consortium(2)
    run = net.run()
    deltas = [net.delta(run, 0, i) for i in (1, 0)]
    told = b"".join(
        delta.fact + weight.to_bytes(4, "little")
        for _, delta, weight in sorted(
            (delta.header.origin, delta, weight)
            for delta, weight in zip(deltas, (60, 50), strict=True)
        )
    )
    digest = hashlib.blake2b(run.run_id + told, digest_size=32, person=b"p2pfed-chain").digest()
    assert net.facts(run, deltas).chain(1) == digest
