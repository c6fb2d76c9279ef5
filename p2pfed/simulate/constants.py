"""A scenario's run constants: any field of the run file, with defaults for the rest.

Values are checked by the run file's own reader, one key at a time, so that every mistake is told
and no bound is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from p2pfed.errors import FactRejected
from p2pfed.identity.run import Outer, Run
from p2pfed.identity.signing import fact_hash
from p2pfed.simulate.tables import Table

__all__ = ["read_constants", "run_of"]

NOT_FOR_YOU = ("name", "network_id", "task", "task_id", "genesis", "type")  # the world decides
PARTS = ("outer", "encoding", "averaging")
TEXTS = ("epsilon", "delta", "clip", "select_share", "top_fraction")  # decimals, kept as text
PART_TEXTS = ("weight_power", "sample_cap")

DEFAULT = Run(
    name="simulated",
    network_id=bytes(32),
    task="simulated",
    task_id=fact_hash(b"simulated"),
    genesis=bytes(32),
    num_parameters=32,
    rounds=20,
    grid_bits=12,
    mechanism="none",
    unit="none",
    epsilon=Fraction(0),
    delta=Fraction(0),
    clip=Fraction(1),
    block_size=1,
    segment_blocks=1,
    select_share=Fraction(0),
    top_fraction=Fraction(1),
    outer=Outer("fedadam", 0.03),
    robust="clip-median",
    quorum=0.8,
    min_live=0.5,
    deadline_s=30.0,
    min_round_interval_s=5.0,
)


def run_of(constants: Mapping[str, Any], network_id: bytes) -> Run:
    """The run that a scenario plays.

    Args:
        constants: As `read_constants` gave them.
        network_id: Of the simulated consortium, 32 bytes.

    Raises:
        FactRejected: The constants contradict each other.
    """
    data = json.loads(DEFAULT.encode())
    data["network_id"] = network_id.hex()
    for key, value in constants.items():
        if key in PARTS:
            data[key] = [data[key][0] | value]
        else:
            data[key] = value
    return Run.decode(json.dumps(data).encode())


def read_constants(table: Table) -> dict[str, Any]:
    """Read `[run]`; mistakes go to the table's."""
    defaults = json.loads(DEFAULT.encode())
    before = len(table.mistakes.lines)
    constants: dict[str, Any] = {}
    for key in defaults:
        if key in NOT_FOR_YOU or key not in table:
            table.raw(key) if key not in NOT_FOR_YOU else None
            continue
        if key in PARTS:
            part = _read_part(table.table(key), defaults[key][0], key)
            if part:
                constants[key] = part
        else:
            value = _as_written(table.raw(key), key in TEXTS)
            if _is_right(table, key, {key: value}):
                constants[key] = value
    table.done()
    try:
        run_of(constants, bytes(32))
    except FactRejected as error:
        if len(table.mistakes.lines) == before:
            table.mistakes.add(table.where, error.what, error.do or error.why)
    else:
        if constants.get("averaging", {}).get("mode", "set") != "set":
            table.mistakes.add(
                "run.averaging.mode", "the simulator plays averaging mode 'set' only"
            )
    return constants


def _read_part(table: Table, defaults: Mapping[str, Any], part: str) -> dict[str, Any]:
    read = {}
    for key in defaults:
        if key in table:
            value = _as_written(table.raw(key), key in PART_TEXTS)
            if _is_right(table, key, {part: {key: value}}):
                read[key] = value
        else:
            table.raw(key)
    table.done()
    return read


def _as_written(value: Any, decimal: bool) -> Any:
    """The run file holds exact decimals as text; in TOML a plain number will do."""
    return str(value) if decimal and type(value) in {int, float} else value


def _is_right(table: Table, key: str, one: Mapping[str, Any]) -> bool:
    """Whether one constant alone is well-formed; what it contradicts is seen with all together."""
    try:
        run_of(one, bytes(32))
    except FactRejected as error:
        if f"{key} is " in error.what:  # of the reader, about this very key
            table.wrong(key, error.what.partition(f"{key} is ")[2] + " is wrong", error.why)
            return False
    return True
