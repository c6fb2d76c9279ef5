"""The command `p2pfed`: finds the command, loads its module alone, tells errors, sets exit codes.

Invariants. Standard output holds data, standard error everything else. An error is three lines:
what, why, what to do; with --json there is also an envelope with `"ok": false` on standard
output. Exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not running, 4 not permitted, 5 not found,
6 timed out, 7 refused by policy, 8 version mismatch, 130 interrupted.

The parser is argparse, because a command must start within four times a bare `python -c pass`:
click alone takes 3.5 times (measured: 33 ms against 9.5; argparse 16).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from p2pfed import __version__
from p2pfed.cli.options import Parser
from p2pfed.errors import ConfigError, P2PFedError

__all__ = ["COMMANDS", "main"]

# command -> (module in p2pfed.cli, one line of help); the module's function of the same name fills
# in the command's parser.
COMMANDS = {
    "init": ("host", "make this node's key and configuration"),
    "node": ("host", "run the daemon in front"),
    "join": ("act", "join the network"),
    "leave": ("act", "leave the network"),
    "share": ("act", "start or stop releasing updates (on, off)"),
    "block": ("act", "have no connection with a member"),
    "unblock": ("act", "have connections with it again"),
    "run": ("runs", "training runs: create, sign, show, accept, list"),
    "status": ("observe", "what this node does, on one screen"),
    "peers": ("observe", "the other members, or one of them"),
    "privacy": ("privacy", "what was spent, and what is left; plan, ledger, audit"),
    "events": ("watch", "what happened; -f follows"),
    "wait": ("watch", "wait for peers or for a round"),
    "steward": ("steward", "keys, rosters and signatures of the stewards"),
    "bootstrap": ("bootstrap", "lists of the peers that are asked first"),
    "config": ("host", "check or show a configuration"),
    "demo": ("host", "five hospitals on this machine train one model"),
    "simulate": ("simulate", "play a scenario with simulated hospitals"),
    "version": ("observe", "versions of this program and of the daemon"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; default: those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 still gets its table
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except P2PFedError as error:
        return _tell(error, as_json="--json" in arguments)
    except SystemExit as done:  # argparse, after -h
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `| head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if os.environ.get("P2PFED_DEBUG"):
            raise
        bug = P2PFedError(
            f"p2pfed failed: {type(error).__name__}: {error}",
            "this is a bug",
            "run it again with P2PFED_DEBUG=1 and report what it prints",
        )
        return _tell(bug, as_json="--json" in arguments)
    return code


def _run(arguments: list[str]) -> int:
    top = Parser(prog="p2pfed", add_help=False)
    top.add_argument("-h", "--help", action="store_true")
    top.add_argument("--version", action="store_true")
    top.add_argument("--socket", metavar="PATH")
    top.add_argument("-c", "--config", metavar="FILE")
    top.add_argument("command", nargs="?")
    top.add_argument("rest", nargs=argparse.REMAINDER)
    given = top.parse_args(arguments)
    if given.version:
        print(f"p2pfed {__version__}")
        return 0
    if given.help or given.command is None:
        print(_overview())
        return 0 if given.help else 2
    if given.command not in COMMANDS:
        raise _unknown(given.command)
    module = importlib.import_module(f"p2pfed.cli.{COMMANDS[given.command][0]}")
    parser = Parser(prog=f"p2pfed {given.command}")
    getattr(module, given.command)(parser)
    defaults = argparse.Namespace(socket=given.socket, config=given.config, json=False)
    args = parser.parse_args(given.rest, namespace=defaults)
    return int(args.run(args) or 0)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: p2pfed [--socket PATH] [-c FILE] COMMAND ...",
            "",
            "Hospitals train one model together as peers, without a server.",
            "",
            *(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "p2pfed COMMAND -h explains a command. First steps: p2pfed init -h, or: p2pfed demo",
            "The daemon's socket: --socket, P2PFED_SOCKET, or as the configuration says, which is",
            "-c FILE, P2PFED_CONFIG, ./p2pfed.toml, ~/.config/p2pfed/ or /etc/p2pfed/p2pfed.toml.",
        ]
    )


def _unknown(command: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return ConfigError(
        f"there is no command {command!r}",
        f"did you mean {near[0]!r}?" if near else "",
        "run: p2pfed -h",
    )


def _tell(error: P2PFedError, *, as_json: bool) -> int:
    from p2pfed.cli.text import envelope, printable

    try:
        print("\n".join(printable(line) for line in str(error).splitlines()), file=sys.stderr)
        if as_json:
            problem = {"title": error.what, "detail": error.why, "hint": error.do}
            print(envelope("error", {**problem, "exit_code": error.exit_code}, ok=False))
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return error.exit_code
