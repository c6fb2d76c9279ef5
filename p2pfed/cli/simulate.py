"""simulate: play a scenario on many seeds; no daemon, no network, no patients.

Results go to standard output, one line per seed, the progress bar to standard error. A broken
invariant is told with the command that replays it, and makes the exit code 1.
"""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import contextmanager

from p2pfed.cli.options import describe
from p2pfed.cli.text import envelope, printable, table
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import Any

    from p2pfed.simulate.play import Result
    from p2pfed.simulate.scenario import Scenario
    from p2pfed.simulate.training import Bring

__all__ = ["simulate"]

MOST_SEEDS = 1_000_000
BAR = 30


def simulate(parser: ArgumentParser) -> None:
    """Fill in the command `simulate`."""
    describe(
        parser,
        "Play a scenario with the nodes' real core on a simulated network, clock and disk, and\n"
        "check what must hold after every event. One seed gives one run, bit for bit. Exit 1 if\n"
        "an invariant breaks; what to say in a scenario file is in docs/simulate.md.",
    )
    parser.add_argument("scenario", nargs="?", help="a TOML file, or a name that --list shows")
    parser.add_argument("--list", action="store_true", help="scenarios that come with p2pfed")
    parser.add_argument("--seeds", metavar="N|A-B", default="1", help="how many, or which")
    parser.add_argument("--seed", metavar="S", help="this one only: replays it")
    parser.add_argument(
        "--task", metavar="TASK", help="train it for real: member i is the task's site i"
    )
    parser.add_argument("--data", metavar="DIR", help="the task's folder, if it needs one")
    parser.add_argument("--no-trace", action="store_true", help="do not hash every event (faster)")
    parser.add_argument("--json", metavar="FILE", dest="out", help="write the results; - prints")
    parser.add_argument("--plots", metavar="DIR", help="draw consensus, coverage and bytes")
    parser.set_defaults(run=_simulate)


def _simulate(args: Namespace) -> int:
    if args.list:
        return _list()
    from p2pfed.simulate.scenario import load_scenario

    if args.scenario is None:
        raise ConfigError(
            "no scenario is named",
            "a scenario is a TOML file, or the name of one that comes along",
            "run: p2pfed simulate --list, or: p2pfed simulate -h",
        )
    seeds = _seeds(args)
    scenario = load_scenario(args.scenario)
    _check_places(args)
    with _trained(args, scenario) as (scenario, bring):
        results = _play_all(args, scenario, seeds, bring)
    _write(args, scenario, results)
    if args.out != "-":
        for line in _summary(scenario, results):
            print(line)
    return 1 if any(result.broken for result in results) else 0


@contextmanager
def _trained(args: Namespace, scenario: Scenario) -> Iterator[tuple[Scenario, Bring | None]]:
    """The scenario, and the task's hospitals in it if one is named."""
    if args.task is None:
        yield scenario, None
        return
    from pathlib import Path

    from p2pfed.demo.simulated import in_simulation, members_of

    folder = None if args.data is None else Path(args.data)
    with in_simulation(scenario, members_of(args.task, scenario.members, data=folder)) as ready:
        yield ready


def _play_all(
    args: Namespace, scenario: Scenario, seeds: range, bring: Bring | None
) -> list[Result]:
    from p2pfed.simulate.play import play

    results = []
    for n, seed in enumerate(seeds):
        show = _bar(scenario, seed, n, len(seeds))
        result = play(scenario, seed, progress=show, traced=not args.no_trace, bring=bring)
        _clear_bar()
        results.append(result)
        if result.broken:
            _tell_broken(args, result)
        elif args.out != "-":
            print(_line(result, scored=bring is not None), flush=True)
    return results


def _list() -> int:
    from p2pfed.simulate.scenario import bundled

    for line in table(("scenario", "what happens"), sorted(bundled().items())):
        print(line)
    return 0


def _seeds(args: Namespace) -> range:
    if args.seed is not None:
        if not re.fullmatch(r"\d{1,9}", args.seed):
            raise ConfigError(f"--seed {args.seed!r}", "a seed is a whole number, e.g. 17")
        return range(int(args.seed), int(args.seed) + 1)
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})", args.seeds)
    if match is None:
        raise ConfigError(
            f"--seeds {args.seeds!r}", "expected how many, or which", "e.g. --seeds 20 or 100-119"
        )
    first, last = (int(match[1]), int(match[2])) if match[1] else (0, int(match[2]) - 1)
    if not first <= last < first + MOST_SEEDS:
        raise ConfigError(
            f"--seeds {args.seeds!r} names no seed",
            "the last comes before the first, or there are none",
            "e.g. --seeds 20 or 100-119",
        )
    return range(first, last + 1)


def _check_places(args: Namespace) -> None:
    """Better before hours of simulation than after."""
    from pathlib import Path

    if args.out not in {None, "-"} and not Path(args.out).resolve().parent.is_dir():
        raise ConfigError(f"cannot write {args.out}", "its folder does not exist", "make it first")
    if args.plots is not None:
        try:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the folder {args.plots}", str(error.strerror)
            ) from error


# --- what is shown -----------------------------------------------------------------------------


def _bar(scenario: Scenario, seed: int, n: int, of: int) -> Callable[[float], None]:
    if not sys.stderr.isatty():
        return lambda _done: None

    def show(done: float) -> None:
        share = min(1.0, done / scenario.until_s)
        filled = "#" * round(BAR * share)
        text = f"\rseed {seed} ({n + 1} of {of})  [{filled:<{BAR}}] {100 * share:3.0f} %"
        print(text, end="", file=sys.stderr, flush=True)

    return show


def _clear_bar() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _line(result: Result, *, scored: bool) -> str:
    trace = f"  trace {result.trace[:16]}" if result.trace else ""
    score = result.points[-1]["score_worst"] if scored and result.points else None
    return (
        f"seed {result.seed}: {result.rounds} rounds, {result.releases} releases,"
        f" {result.node_hours:.1f} node-hours, {result.events} events"
        + (f", score {score:.3f}" if score is not None else "")
        + trace
    )


def _tell_broken(args: Namespace, result: Result) -> None:
    lines = [
        f"seed {result.seed} BROKE: {printable(result.broken)}",
        f"at {result.at_s:.3f} s, event {result.events}, scenario {args.scenario}",
        f"replay: p2pfed simulate {shlex.quote(args.scenario)} --seed {result.seed}{_task(args)}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
    if result.detail:
        print(result.detail, file=sys.stderr, flush=True)


def _task(args: Namespace) -> str:
    named = (("--task", args.task), ("--data", args.data))
    return "".join(f" {option} {shlex.quote(value)}" for option, value in named if value)


def _summary(scenario: Scenario, results: list[Result]) -> Iterable[str]:
    broken = [r.seed for r in results if r.broken]
    hours = sum(r.node_hours for r in results)
    verdict = f"{len(broken)} BROKE: {broken}" if broken else "every invariant held"
    yield f"{scenario.name}: {len(results)} seeds, {hours:.1f} node-hours: {verdict}"


# --- what is written ---------------------------------------------------------------------------


def _write(args: Namespace, scenario: Scenario, results: list[Result]) -> None:
    from dataclasses import asdict
    from pathlib import Path

    data: dict[str, Any] = {
        "scenario": scenario.name,
        "title": scenario.title,
        "members": scenario.members,
        "gossip_interval_s": scenario.liveness.gossip_interval,
        "seeds": [asdict(result) for result in results],
    }
    if args.out is not None:
        text = envelope("simulation", data, ok=not any(r.broken for r in results))
        if args.out == "-":
            print(text)
        else:
            _save(Path(args.out), text + "\n")
    if args.plots is not None:
        from p2pfed.report.simulation import draw_simulation

        draw_simulation(data, Path(args.plots))


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}", str(error.strerror)) from error
