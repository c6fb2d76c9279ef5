"""The argument parser, and the options that several commands share.

Invariant: wrong arguments are a ConfigError of three lines (exit 2), never argparse's own exit.
Options that can also stand before the command (--socket, -c) have no default here, so that they do
not hide what stood there.
"""

from __future__ import annotations

import argparse
import sys

from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

__all__ = ["Parser", "confirmed", "describe", "with_json", "with_socket"]


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with our errors."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments, as a ConfigError."""
        usage = " ".join(self.format_usage().split())
        raise ConfigError(f"{self.prog}: {message}", usage, f"run: {self.prog} -h")


def describe(parser: argparse.ArgumentParser, text: str, *, endpoint: str = "") -> None:
    """Set a command's help text, and name the endpoint that it calls."""
    parser.description = text
    parser.epilog = f"endpoint: {endpoint}" if endpoint else None


def with_json(parser: argparse.ArgumentParser) -> None:
    """Offer --json."""
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON for programs"
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
