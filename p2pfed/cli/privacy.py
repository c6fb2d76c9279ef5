"""privacy: what was spent and what is left; the group of `plan`, `ledger` and `audit`.

Invariant: `p2pfed privacy` alone is one GET, joined with the trainer's private socket, and loads
nothing heavy; the module of a subcommand is loaded when that subcommand is called.
"""

from __future__ import annotations

from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.observe import field_lines, privacy_line
from p2pfed.cli.options import Parser, describe, with_socket
from p2pfed.cli.text import emit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
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
    lines = [privacy_line(data)] if data.get("mechanism") else []
    lines += field_lines(data)
    if isinstance(ledger, dict):
        entries = ledger.get("entries")
        if isinstance(entries, list):
            ledger = {**ledger, "entries": len(entries), "last entry": entries[-1:]}
        lines += ["", "ledger (this machine only)", *(f"  {line}" for line in field_lines(ledger))]
    emit(args, "privacy", data, lines)


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
