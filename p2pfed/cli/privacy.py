"""privacy: what was spent and what is left; the group of `plan`, `ledger` and `audit`.

Invariant: `p2pfed privacy` alone is one GET, joined with the trainer's private socket, and loads
nothing heavy; the module of a subcommand is loaded when that subcommand is called.
"""

from __future__ import annotations

from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.observe import privacy_words
from p2pfed.cli.options import Parser, describe, with_socket
from p2pfed.cli.text import emit, number, utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["ACTIONS", "paragraph", "privacy"]

_WIDTH = 100

# subcommand -> one line of help; the function of the same name in the module of the same name in
# p2pfed.cli fills in its parser.
ACTIONS = {
    "plan": "before a run: what each mechanism would release, and how noisy",
    "ledger": "print, verify or export what was spent",
    "audit": "check on this machine that the gate does what it claims",
}


class _Action(Parser):
    """A subcommand that learns its options when it is called."""

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Fill in the options first."""
        import importlib

        name, self.module = self.module, ""
        if name:
            getattr(importlib.import_module(f"p2pfed.cli.{name}"), name)(self)
        return super().parse_known_args(args, namespace)


def privacy(parser: ArgumentParser) -> None:
    """Fill in the command `privacy` and its subcommands."""
    describe(
        parser,
        "What was spent and what is left. The ledger itself belongs to the trainer; it is shown\n"
        "where you may read the trainer's private socket.",
        endpoint="GET /v1/privacy   (and GET /v1/ledger of the private socket)",
    )
    with_socket(parser)
    parser.set_defaults(run=_privacy)
    actions = parser.add_subparsers(metavar="ACTION", parser_class=_Action)
    for name, text in ACTIONS.items():
        actions.add_parser(name, help=text).module = name


def _privacy(args: Namespace) -> None:
    data = admin_client(args).get("/v1/privacy")
    ledger = private_data(args, "ledger")
    if args.json:
        emit(args, "privacy", {**data, "ledger": ledger}, ())
        return
    lines = [*_said(data), *_of_ledger(ledger)] if isinstance(ledger, dict) else _said(data)
    emit(args, "privacy", data, lines)


def _said(data: dict[str, Any]) -> Iterator[str]:
    """What GET /v1/privacy says: the budget of the data set, the run, what goes beside it."""
    spent, forecast = privacy_words(data)
    yield f"spent     {spent}"
    if forecast:
        yield f"          {forecast}"
    if data["epsilon"]:  # a node without a trainer has none
        limit = f"ε {number(data['epsilon'])} (δ {number(data['delta'])})"
        yield f"budget    {limit}, of this data set for its whole life, over all runs"
    asked = data.get("run_epsilon")
    if asked is not None and data.get("mechanism") != "none":
        stops = f"; this hospital stops at its own ε {number(data['epsilon'])}"
        yield f"run       at most ε {number(asked)}{stops if asked > data['epsilon'] > 0 else ''}"
    if data.get("share_metrics") == "rounded":
        yield "metric    the main one, two digits, goes to all members; outside ε"


def _of_ledger(ledger: dict[str, Any]) -> Iterator[str]:
    """What GET /v1/ledger of the private socket says; a field that is missing is left out."""
    yield ""
    yield "ledger    on this machine only; all of it: p2pfed privacy ledger"
    spent, limit = (ledger.get(key) or {} for key in ("spent", "limit"))
    if "epsilon" in spent and "epsilon" in limit:
        budget = f"ε {number(spent['epsilon'])} of {number(limit['epsilon'])} spent"
        yield f"          {budget}, {ledger.get('releases', 0)} releases"
    if ledger.get("unprotected"):
        yield f"# warning: {ledger['unprotected']} of them left WITHOUT noise: no ε protects them"
    entries = ledger.get("entries") or []
    if entries:
        last = entries[-1]
        words = [f"{len(entries)} records, the last: {last.get('kind', '?')}"]
        words += [f"of round {last['round']}"] if "round" in last else []
        words += [f"at {utc(last['at'])} UTC"] if "at" in last else []
        yield f"          {' '.join(words)}"
    if ledger.get("head"):
        yield f"head      {ledger['head']}"


def paragraph(text: str, *, first: str = "") -> list[str]:
    """Lines of at most 100 columns; those after the first are indented by the length of `first`."""
    from textwrap import wrap

    return wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
