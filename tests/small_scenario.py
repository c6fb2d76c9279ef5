"""A scenario that is played in a tenth of a second, and one with a bit of everything."""

from __future__ import annotations

from p2pfed.simulate.scenario import Scenario, read_scenario

__all__ = ["ROUGH", "SMALL", "scenario_of"]

SMALL = """
until_s = 60
settle_s = 20

[members]
count = 3

[run]
rounds = 6
deadline_s = 5
min_round_interval_s = 2
num_parameters = 8

[timers]
tick_s = 0.5
gossip_interval_s = 2
brisk_interval_s = 0.5

[check]
every_s = 5
"""

ROUGH = """
until_s = 90
settle_s = 60

[members]
count = 6
samples = "log-normal"
unlisted = ["h5"]
byzantine = { garbage = ["h4"] }

[run]
rounds = 10
deadline_s = 5
min_round_interval_s = 2

[network]
loss = 0.05
spike = 0.01

[timers]
tick_s = 0.5

[churn]
crash_every_s = 20
down_s = [2, 8]
partition_every_s = 30
partition_s = [5, 15]
clog_every_s = 30
clog_s = [2, 6]

[[event]]
at_s = 20
do = "add"
members = ["h5"]

[[event]]
at_s = 30
do = "crash"
members = { some = 2 }
down_s = 5

[[event]]
at_s = 50
do = "revoke"
members = ["h3"]
from_round = 2
"""


def scenario_of(text: str = SMALL, **changes: str) -> Scenario:
    """A scenario from TOML text; a change replaces the value of a key, wherever it stands."""
    lines = [
        f"{key} = {changes[key]}" if key in changes else line
        for line in text.splitlines()
        for key in [line.partition(" = ")[0]]
    ]
    return read_scenario("\n".join(lines), "small")
