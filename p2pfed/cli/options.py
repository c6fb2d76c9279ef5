"""The argument parser, and the options that several commands share.

Invariant: wrong arguments are a ConfigError of three lines (exit 2), never argparse's own exit.
Options that can also stand before the command (--socket, -c, --json, --no-color) have no default
here, so that they do not hide what stood there.
"""

from __future__ import annotations

import argparse
import sys

from p2pfed.cli.text import columns
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_WIDEST = 100

__all__ = ["Parser", "confirmed", "describe", "with_json", "with_socket"]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal.

    argparse makes a formatter for every option that is added, and each would load shutil for the
    width: 2 ms of a start of 35.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=max(40, min(columns() - 2, _WIDEST)))


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with our errors."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", _Formatter)
        super().__init__(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a subcommand itself tells what it does not know."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return known, rest

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments, as a ConfigError."""
        usage = " ".join(self.format_usage().split())
        raise ConfigError(f"{self.prog}: {message}", usage, f"run: {self.prog} -h")


def describe(parser: argparse.ArgumentParser, text: str, *, endpoint: str = "") -> None:
    """Set a command's help text, and name the endpoint that it calls."""
    parser.description = text
    parser.epilog = f"endpoint: {endpoint}" if endpoint else None


def with_json(parser: argparse.ArgumentParser) -> None:
    """Offer --json, and --no-color, which stands in the program's own help."""
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON for programs"
    )
    parser.add_argument(
        "--no-color", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def with_socket(parser: argparse.ArgumentParser) -> None:
    """Offer --socket, -c and --json: for commands that ask the daemon."""
    parser.add_argument(
        "--socket", metavar="PATH", default=argparse.SUPPRESS, help="the daemon's admin socket"
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="the daemon's configuration, to find its socket",
    )
    with_json(parser)


def confirmed(args: argparse.Namespace, question: str) -> bool:
    """Ask once, unless --yes was given.

    Raises:
        ConfigError: There is no terminal to ask on, and no --yes.
    """
    if args.yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "this needs a yes, and there is no terminal to ask on",
            question,
            "add --yes if you mean it",
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
