"""What `top` shows: a film of looks at the sockets, and the screen as a pure function of it.

Map: `Snapshot` is what one look gave; `Film` keeps the last of them, from which rates come; `frame`
turns a film into lines of exactly the terminal's size.

Invariant: nothing here asks, waits or knows a clock. What a peer or a task named is printed with
printable characters only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from p2pfed import __version__
from p2pfed.cli.observe import model_word, peer_row, privacy_words, time_split
from p2pfed.cli.text import cut, number, printable, short_id, size, span, took

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from rich.text import Text

__all__ = ["SORTS", "Film", "Snapshot", "frame", "spark"]

KEPT = 120  # snapshots
KEPT_EVENTS = 200
RATE_S = 5.0  # rates are over so long, or as long as there are snapshots
SORTS = ("name", "state", "rtt", "traffic", "seen")
LONGEST = 24  # characters of an event's value; hashes are longer
NAME = 10  # columns for the run's name
SPARKS = "▁▂▃▄▅▆▇█"
_STYLES = {"alive": "green", "suspect": "yellow", "away": "yellow", "left": "dim", "revoked": "red"}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at the sockets.

    Attributes:
        at: When, in seconds of a clock that only grows.
        status: GET /v1/status, or None where the daemon did not answer.
        peers: GET /v1/peers.
        metrics: `{"metrics": [...]}` of the private socket, or None.
        trainer: /v1/status of the private socket, or None.
        problem: Why there is no status, in one line.
    """

    at: float
    status: dict[str, Any] | None
    peers: list[dict[str, Any]] = field(default_factory=list)
    metrics: Any = None
    trainer: Any = None
    problem: str = ""


class Film:
    """The last snapshots and events.

    Attributes:
        last: The newest snapshot.
        known: The newest one that the daemon answered, or None.
        events: The newest events, oldest first.
    """

    def __init__(self) -> None:
        self._frames: deque[Snapshot] = deque(maxlen=KEPT)
        self._rounds: dict[int, float] = {}
        self._models: dict[int, str] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self.last = Snapshot(0.0, None, problem="not asked yet")

    @property
    def known(self) -> Snapshot | None:
        """The newest snapshot that the daemon answered."""
        return self._frames[-1] if self._frames else None

    @property
    def since(self) -> int:
        """The number of the newest event."""
        return int(self.events[-1].get("seq") or 0) if self.events else 0

    def add(self, shot: Snapshot, events: list[dict[str, Any]]) -> None:
        """Take in a look and the events that are new; an older pid's counters are forgotten."""
        self.last = shot
        self.events.extend(event for event in events if event.get("type") != "gap")
        if shot.status is None:
            return
        before = self.known
        if before and before.status and before.status.get("pid") != shot.status.get("pid"):
            self._frames.clear()  # another daemon: its counters began anew
        self._frames.append(shot)
        last, run = shot.status.get("round_seconds") or {}, shot.status.get("run") or {}
        if last:
            self._rounds[last["round"]] = last["seconds"]
        if run.get("model_hash"):
            self._models[run["model_round"]] = run["model_hash"]

    def model_word(self, peer: dict[str, Any]) -> str:
        """As `observe.model_word`; a peer that is behind is compared with what we held then.

        That it held another is not said: a late delta may have come in between.
        """
        run = self.known.status.get("run") if self.known and self.known.status else None
        held = self._models.get(peer.get("model_round") or 0)
        return "same" if held and peer["model_hash"] == held else model_word(peer, run)

    def rates(self, peer_id: str) -> tuple[float, float] | None:
        """Bytes per second sent to and received from a peer; None without two looks."""
        end = self.known
        if end is None:
            return None
        start = next((shot for shot in self._frames if end.at - shot.at <= RATE_S), end)
        first, last = _counters(start, peer_id), _counters(end, peer_id)
        if first is None or last is None or end.at <= start.at:
            return None
        passed = end.at - start.at
        return max(0.0, last[0] - first[0]) / passed, max(0.0, last[1] - first[1]) / passed

    def round_seconds(self) -> list[float]:
        """How long the last rounds took, oldest first."""
        return [self._rounds[round_] for round_ in sorted(self._rounds)][-40:]


def _counters(shot: Snapshot, peer_id: str) -> tuple[float, float] | None:
    for peer in shot.peers:
        if peer["peer_id"] == peer_id:
            return peer["sent_bytes"], peer["received_bytes"]
    return None


# --- drawing -----------------------------------------------------------------------------------


def frame(film: Film, width: int, height: int, *, sort: str = "name") -> list[Text]:
    """The screen as `height` lines of at most `width` characters.

    Args:
        film: What was seen.
        width: Columns, at least 20.
        height: Lines, at least 8.
        sort: One of `SORTS`: the order of the peers.
    """
    shot, wide = film.known, width >= 110
    foot = [_line("q quit   p sort peers: " + sort, "dim")]
    if film.last.status is None:
        foot.insert(0, _line(f"waiting for the daemon: {film.last.problem}", "bold yellow"))
    if shot is None or shot.status is None:
        body = [_line("p2pfed top", "bold")]
        return _fitted(body, foot, width, height)
    head = [*_head(film, shot, width), *(_line("# " + t, "yellow") for t in _warnings(shot)[:3])]
    room = height - len(head) - len(foot)
    table = list(_peer_lines(film, shot, sort, wide=wide))
    shown = len(table) if len(table) + 4 <= room else max(2, room - 4)
    hidden = len(table) - shown
    table = table[:shown]
    if hidden > 0:
        table[-1] = _line(f"… {hidden + 1} more peers", "dim")
    happened = [_line(_event(event)) for event in film.events]
    left = max(0, room - len(table) - 1)
    body = [*head, *table, _line("", ""), *(happened[-left:] if left else [])]
    return _fitted(body, foot, width, height)


def _fitted(body: list[Text], foot: list[Text], width: int, height: int) -> list[Text]:
    room = max(0, height - len(foot))
    lines = [*body[:room], *(_line("", "") for _ in range(room - len(body))), *foot][:height]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _event(event: dict[str, Any]) -> str:
    """One event with the time of day alone."""
    data = event.get("data") or {}
    told = "  ".join(f"{key}={cut(str(value), LONGEST)}" for key, value in data.items())
    return f"{str(event.get('ts', ''))[11:19]}  {event.get('type')}  {told}"


def _line(text: str, style: str = "") -> Text:
    return _spans((text, style))


def _spans(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    line = Text(no_wrap=True, overflow="ellipsis", end="")
    for text, style in parts:
        line.append(printable(text), style=style or None)
    return line


def _warnings(shot: Snapshot) -> list[str]:
    status = shot.status or {}
    lines = [str(line) for line in status.get("health") or ()]
    if status.get("version") != __version__:
        lines.append(f"this is p2pfed {__version__}, the daemon is {status.get('version')}")
    return lines


def _head(film: Film, shot: Snapshot, width: int) -> Iterator[Text]:
    status = shot.status or {}
    network, roster = status.get("network") or {}, status.get("roster") or {}
    counts = [f"{n} {state}" for state, n in status["peers"].items() if n or state == "alive"]
    yield _spans(
        (status["name"], "bold"),
        (f"  {short_id(status['peer_id'])}   ", "dim"),
        (f"{network.get('name') or 'no network'}  roster v{roster.get('version', '-')}   ", ""),
        (" · ".join(counts), "green"),
    )
    run = status.get("run")
    bar = max(10, min(40, width - 72))
    if not run:
        yield _line("run      none; see: p2pfed run list")
    else:
        yield _run_line(run, film, shot, bar)
    yield _privacy_line(status, bar)
    yield from _measures(film, shot)
    split = time_split(shot.trainer)
    yield _line(f"time     {split or _round_words(status)}")
    contributing = status["contributing"]
    reason = contributing.get("reason") or ("" if status["sharing"] else "sharing is off")
    words = "contributing" if contributing["yes"] else f"not contributing: {reason}"
    traffic = status["traffic"]
    yield _spans(
        (f"trainer  {status['trainer']['state']}{_step(shot.trainer)}   ", ""),
        (words, "" if contributing["yes"] else "yellow"),
        (f"   ↑{size(traffic['sent_bytes'])} ↓{size(traffic['received_bytes'])}", "dim"),
        (f"   up {span(status['uptime_s'])}", "dim"),
    )


def _run_line(run: dict[str, Any], film: Film, shot: Snapshot, bar: int) -> Text:
    words = [film.model_word(peer) for peer in shot.peers]
    same, differ = words.count("same"), sum(word.startswith("≠") for word in words)
    model = f"model {run['model_hash'][:6]} of {run['model_round']}" if run["model_hash"] else ""
    return _spans(
        (f"run      {cut(run['name'], NAME):<{NAME}} ", ""),
        (_bar(run["round"] / max(1, run["rounds"]), bar), "cyan"),
        (f" {run['round']}/{run['rounds']} {run['phase']}   ", ""),
        (f"{differ} DIFFER   " if differ else "", "bold red"),
        (model, ""),
        (f", {same} same" if same else "", "green"),
    )


def _privacy_line(status: dict[str, Any], bar: int) -> Text:
    privacy = status["privacy"]
    mechanism = privacy.get("mechanism")
    if mechanism in {None, "none"}:
        words = privacy_words(privacy)[0]
        return _line(f"privacy  {words}", "bold red" if mechanism else "")
    spent, limit = privacy["spent_epsilon"], privacy["epsilon"]
    part = spent / limit if limit else 1.0
    forecast = privacy.get("forecast_round")
    return _spans(
        (f"privacy  {mechanism:<{NAME}} ", ""),
        (_bar(part, bar), "red" if part > 0.9 else "yellow" if part > 0.7 else "green"),
        (f" ε {number(spent)} of {number(limit)}   {privacy['releases']} releases", ""),
        ("" if forecast is None else f"   stops at ≈ {forecast}", "dim"),
    )


def _measures(film: Film, shot: Snapshot) -> Iterator[Text]:
    """Sparklines of the own metric (private) and of the seconds of rounds."""
    name, values = _own_metric(shot.metrics)
    parts = []
    if values:
        parts += [(f"private  {name} {number(values[-1])} ", ""), (spark(values[-24:]), "cyan")]
    seconds = film.round_seconds()
    if seconds:
        label = "   round " if parts else "rounds   "
        parts += [(f"{label}{took(seconds[-1])} ", ""), (spark(seconds[-24:]), "magenta")]
    yield _spans(*(parts or [("rounds   none has ended since this began", "dim")]))


def _own_metric(answer: Any) -> tuple[str, list[float]]:
    """The first measure that the private socket names, over its rounds."""
    try:
        lines = answer["metrics"]
        name = next(iter(lines[-1]["values"]))
        return name, [float(line["values"][name]) for line in lines if name in line["values"]]
    except (TypeError, KeyError, IndexError, StopIteration, ValueError, AttributeError):
        return "", []


def _step(trainer: Any) -> str:
    try:
        now = trainer["progress"]
        return f" {now['step']} {now['done']}/{now['of']}"
    except (TypeError, KeyError):
        return ""


def _round_words(status: dict[str, Any]) -> str:
    last = status.get("round_seconds") or {}
    if not last:
        return "-"
    return (
        f"{took(last['seconds'])}, of these {took(last['waiting'])} waiting, round {last['round']}"
    )


def _bar(part: float, width: int) -> str:
    full = round(max(0.0, min(1.0, part)) * width)
    return "█" * full + "░" * (width - full)


def spark(values: list[float]) -> str:
    """One block per value, between the least and the greatest of them."""
    finite = [value for value in values if value - value == 0]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    step = (high - low) / (len(SPARKS) - 1) or 1.0
    return "".join(SPARKS[round((v - low) / step)] if v - v == 0 else " " for v in values)


def _peer_lines(film: Film, shot: Snapshot, sort: str, *, wide: bool) -> Iterator[Text]:
    run = (shot.status or {}).get("run")
    name = 24 if wide else 14
    head = ("NAME", "STATE", "ROUND", "RTT", "PATH", "↑/s", "↓/s", "MODEL", "METRIC", "SEEN")
    widths = (name, 7, 5, 7, 6, 7, 7, 7, 6, 5)
    more = "  SENT     RECV     SAMPLES" if wide else ""
    yield _line(_cells(head, widths) + more, "bold")
    for peer in sorted(shot.peers, key=lambda peer: _order(film, peer, sort)):
        shown, rates = peer_row(peer, run), film.rates(peer["peer_id"])
        up, down = ("-", "-") if rates is None else (size(rates[0]), size(rates[1]))
        model = film.model_word(peer)
        row = (*shown[:5], up, down, model, *shown[8:])
        text = _cells(row, widths)
        if wide:
            text += f"  {shown[5]:<7}  {shown[6]:<7}  {peer.get('samples', '-')}"
        style = _STYLES.get(peer["state"], "dim")
        yield _line(text, "bold red" if model.startswith("≠") else style)


def _cells(row: tuple[str, ...], widths: tuple[int, ...]) -> str:
    cells = (cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True))
    return " ".join(cells)


def _order(film: Film, peer: dict[str, Any], sort: str) -> tuple[Any, ...]:
    last = float("inf")
    if sort == "traffic":
        return (-sum(film.rates(peer["peer_id"]) or (0.0,)), peer["name"])
    if sort == "rtt":
        return (last if peer.get("rtt_ms") is None else peer["rtt_ms"], peer["name"])
    if sort == "seen":
        return (last if peer.get("seen_s") is None else peer["seen_s"], peer["name"])
    return (peer["state"] if sort == "state" else "", peer["name"])
