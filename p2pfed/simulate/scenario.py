"""A scenario file: who takes part, on what network, what happens when; read strictly from TOML.

All mistakes are reported at once. Members are called `h0`, `h1`, ... in the order of the roster; a
list of them may hold ranges, `["h0-h9", "h12"]`, and `{ some = 3 }` lets the seed choose three.
Times are seconds from the start. The keys are listed in docs/simulate.md.

Scenarios that come with the package are found by their name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from p2pfed.errors import ConfigError
from p2pfed.gossip.membership import Liveness
from p2pfed.simulate.constants import read_constants
from p2pfed.simulate.happenings import Happening, read_happening, read_members
from p2pfed.simulate.tables import Mistakes, Table

__all__ = ["Happening", "Scenario", "bundled", "load_scenario", "read_scenario"]

MOST_MEMBERS = 1024
LIES = ("equivocate", "far-ahead", "hasty", "flip", "replay", "garbage", "miscount")
TRAININGS = ("synthetic", "quadratic", "softmax")


@dataclass(frozen=True, slots=True)
class Churn:
    """Misfortunes at rates, drawn by the seed: mean seconds between two (0: never), how long."""

    until_s: float = 0.0
    crash_every_s: float = 0.0
    down_s: tuple[float, float] = (5.0, 60.0)
    partition_every_s: float = 0.0
    partition_s: tuple[float, float] = (20.0, 120.0)
    clog_every_s: float = 0.0
    clog_s: tuple[float, float] = (5.0, 30.0)
    freeze_every_s: float = 0.0
    freeze_s: tuple[float, float] = (0.5, 3.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """See the module docstring; the attributes are the tables of the file.

    Attributes:
        name: File name without its ending.
        title: For people.
        until_s: Until then the timeline and the churn run; then everything heals.
        settle_s: Most time from then on until all honest nodes agree.
        members: How many members the roster lists.
        late: Members that are on the roster and not started at the beginning.
        unlisted: Members that only a later roster lists (`add`).
        samples: Public sample counts by member; empty: log-normal by the seed.
        median: Median of the log-normal sample counts.
        sigma: Its width.
        lies: Byzantine members and what they do.
        run: Constants of the run.
        training: What a release is made from: one of `TRAININGS`.
        train_s: How long a training takes, least and most.
        latency_s: Least and greatest latency.
        loss: Chance that a frame is lost.
        spike: Chance that a frame is late.
        spike_s: By how much.
        contacts: How many members everybody knows the address of from the start.
        tick_s: Time between ticks of a core.
        sync_s: Time until a stored foreign delta survives a crash.
        liveness: The core's own timers.
        churn: Random misfortunes.
        full_fold_every: One in how many folds is done in full.
        check_every_s: Time between full checks.
        patience: Deadlines that a connected quorum may take for one round.
        agree: Whether all honest nodes must agree in the end.
        sample_s: Time between two points of the plots.
        events: The timeline, by time.
    """

    name: str
    title: str
    until_s: float
    settle_s: float
    members: int
    late: tuple[int, ...]
    unlisted: tuple[int, ...]
    samples: tuple[int, ...]
    median: float
    sigma: float
    lies: Mapping[int, str]
    run: Mapping[str, Any]
    training: str
    train_s: tuple[float, float]
    latency_s: tuple[float, float]
    loss: float
    spike: float
    spike_s: float
    contacts: int
    tick_s: float
    sync_s: float
    liveness: Liveness
    churn: Churn
    full_fold_every: int
    check_every_s: float
    patience: float
    agree: bool
    sample_s: float
    events: tuple[Happening, ...]

    @property
    def uses_models(self) -> bool:
        """Whether a release depends on the model."""
        return self.training != "synthetic"


def bundled() -> dict[str, str]:
    """Name -> title of the scenarios that come with the package."""
    folder = files("p2pfed.simulate") / "scenarios"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            title = tomllib.loads(file.read_text("utf-8")).get("title", "")
            found[file.name.removesuffix(".toml")] = str(title)
    return found


def load_scenario(where: str) -> Scenario:
    """Read a scenario by the path of its file, or by its name if it comes with the package.

    Raises:
        ConfigError: There is no such file or name, it is not TOML, or it has mistakes: all of them.
    """
    is_name = re.fullmatch(r"[a-z0-9-]{1,64}", where) is not None
    inside = files("p2pfed.simulate") / "scenarios" / f"{where}.toml"
    if is_name and not Path(where).is_file():
        if not inside.is_file():
            raise ConfigError(
                f"there is no scenario {where!r}",
                "neither a file nor a name that comes with p2pfed",
                "run: p2pfed simulate --list",
            )
        return read_scenario(inside.read_text("utf-8"), where)
    try:
        text = Path(where).read_text("utf-8")
    except (OSError, ValueError) as error:
        undecodable = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        reason = error.strerror if isinstance(error, OSError) else undecodable
        raise ConfigError(
            f"cannot read the scenario {where}", str(reason), "run: p2pfed simulate --list"
        ) from error
    return read_scenario(text, Path(where).stem, file=where)


def read_scenario(text: str, name: str, *, file: str = "") -> Scenario:
    """Read a scenario from TOML text; raises ConfigError with all its mistakes."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML, or an integer without end
        raise ConfigError(
            f"{file or name} is not TOML", str(error), "correct the line named above"
        ) from error
    mistakes = Mistakes(file or f"the scenario {name}")
    scenario = _Reader(Table(data, "", mistakes), name).read()
    mistakes.tell()
    return scenario


class _Reader:
    """Reads the tables in turn; later ones need the number of members and the end."""

    def __init__(self, top: Table, name: str) -> None:
        self._top = top
        self._name = name
        self._end = top.number("until_s", 600.0, low=1.0, high=1e8)
        self._count = 1

    def read(self) -> Scenario:
        """The scenario; wrong if there are mistakes."""
        top = self._top
        plain: dict[str, Any] = {
            "title": top.text("title", self._name),
            "settle_s": top.number("settle_s", 600.0, low=1.0, high=1e8),
        }
        parts = (self._members, self._training, self._network, self._timers, self._check)
        for part in parts:
            plain |= part()
        plain["run"] = read_constants(top.table("run"))
        plain["churn"] = self._churn(top.table("churn"))
        events = [read_happening(one, self._count, self._end) for one in top.tables("event")]
        plain["events"] = events
        top.done()
        self._check_together(plain)
        plain["events"] = tuple(sorted(events, key=lambda e: e.at_s))
        return Scenario(name=self._name, until_s=self._end, **plain)

    def _members(self) -> dict[str, Any]:
        table = self._top.table("members")
        self._count = table.integer("count", 5, low=1, high=MOST_MEMBERS)
        samples = table.raw("samples", 100)
        if type(samples) is int:
            samples = [samples] * self._count
        if samples == "log-normal":
            samples = []
        elif not (
            isinstance(samples, list)
            and len(samples) == self._count
            and all(type(n) is int and 0 < n <= 1 << 20 for n in samples)
        ):
            wanted = f"an integer, {self._count} integers from 1 to {1 << 20}, or 'log-normal'"
            table.wrong("samples", f"{samples!r:.40} is wrong", wanted)
            samples = []
        read = {
            "members": self._count,
            "samples": tuple(samples),
            "median": table.number("median", 200.0, low=1.0, high=1e5),
            "sigma": table.number("sigma", 1.0, high=3.0),
            "late": read_members(table, self._count, "late"),
            "unlisted": read_members(table, self._count, "unlisted"),
            "lies": self._lies(table.table("byzantine")),
        }
        table.done()
        return read

    def _lies(self, table: Table) -> dict[int, str]:
        lies: dict[int, str] = {}
        for lie in LIES:
            for member in read_members(table, self._count, lie):
                if member in lies:
                    table.wrong(lie, f"h{member} does {lies[member]!r} already", "one lie each")
                lies[member] = lie
        table.done()
        return lies

    def _training(self) -> dict[str, Any]:
        table = self._top.table("training")
        read = {
            "training": table.one_of("kind", TRAININGS, "synthetic"),
            "train_s": table.pair("seconds", (1.0, 3.0)),
        }
        table.done()
        return read

    def _network(self) -> dict[str, Any]:
        table = self._top.table("network")
        read = {
            "latency_s": table.pair("latency_s", (0.005, 0.05)),
            "loss": table.number("loss", 0.0, high=0.9),
            "spike": table.number("spike", 0.0, high=1.0),
            "spike_s": table.number("spike_s", 2.0, high=3600.0),
            "contacts": table.integer("contacts", 3, low=1, high=MOST_MEMBERS),
        }
        table.done()
        return read

    def _timers(self) -> dict[str, Any]:
        table = self._top.table("timers")
        usual = Liveness()
        read = {
            "tick_s": table.number("tick_s", 0.25, low=0.01, high=600.0),
            "sync_s": table.number("sync_s", 1.0, low=0.01, high=3600.0),
        }
        own: dict[str, Any] = {
            name: table.number(f"{name}_s", default, low=0.01, high=1e6)
            if isinstance(default := getattr(usual, name), float)
            else table.integer(name, default, low=1, high=MOST_MEMBERS)
            for name in Liveness.__dataclass_fields__
        }
        liveness = Liveness(**own)
        if not liveness.beat_interval < liveness.suspect_after < liveness.away_after:
            table.mistakes.add(
                "timers",
                "a peer would be given up before it could beat",
                "beat_interval_s < suspect_after_s < away_after_s is expected",
            )
        table.done()
        return {**read, "liveness": liveness}

    def _check(self) -> dict[str, Any]:
        table = self._top.table("check")
        read = {
            "full_fold_every": table.integer("full_fold_every", 1, low=1, high=1 << 20),
            "check_every_s": table.number("every_s", self._end / 20, low=0.1, high=1e8),
            "patience": table.number("patience", 10.0, low=1.0, high=1e6),
            "agree": table.flag("agree", default=True),
            "sample_s": table.number("sample_s", self._end / 200, low=0.01, high=1e8),
        }
        table.done()
        return read

    def _churn(self, table: Table) -> Churn:
        usual = Churn()
        churn = Churn(
            until_s=table.number("until_s", self._end, high=self._end),
            crash_every_s=table.number("crash_every_s", 0.0),
            down_s=table.pair("down_s", usual.down_s),
            partition_every_s=table.number("partition_every_s", 0.0),
            partition_s=table.pair("partition_s", usual.partition_s),
            clog_every_s=table.number("clog_every_s", 0.0),
            clog_s=table.pair("clog_s", usual.clog_s),
            freeze_every_s=table.number("freeze_every_s", 0.0),
            freeze_s=table.pair("freeze_s", usual.freeze_s),
        )
        table.done()
        return churn

    def _check_together(self, plain: Mapping[str, Any]) -> None:
        mistakes = self._top.mistakes
        honest = set(range(plain["members"])) - set(plain["lies"])
        if not honest - set(plain["unlisted"]):
            mistakes.add("members", "nobody honest is on the roster")
        if plain["training"] != "synthetic" and plain["full_fold_every"] > 1:
            mistakes.add(
                "check.full_fold_every",
                "a training that looks at the model needs every fold in full",
                "leave it out, or use training.kind = 'synthetic'",
            )
        added = {m for e in plain["events"] if e.do == "add" for m in e.members}
        for member in sorted(set(plain["unlisted"]) - added):
            mistakes.add("members.unlisted", f"no event adds h{member}", "do = 'add'")
        for i, event in enumerate(plain["events"]):
            if event.do == "add" and not set(event.members) <= set(plain["unlisted"]):
                mistakes.add(
                    f"event[{i}]", "adds a member that is listed", "name it in members.unlisted"
                )
