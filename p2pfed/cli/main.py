"""The command `p2pfed`: finds the command, loads its module alone, tells errors, sets exit codes.

Invariants. Standard output holds data, standard error everything else. An error is three lines:
what, why, what to do; with --json there is also an envelope with `"ok": false` on standard
output. Exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not running, 4 not permitted, 5 not found,
6 timed out, 7 refused by policy, 8 version mismatch, 9 a doctor check failed, 130 interrupted.

The parser is argparse, because a command must start within three times a bare `python -c pass`:
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

__all__ = ["COMMANDS", "main", "parser_of"]

# command -> (module in p2pfed.cli, one line of help); the module's function of the same name fills
# in the command's parser.
COMMANDS = {
    "init": ("init", "make this node's key and configuration"),
    "node": ("host", "run the daemon in front"),
    "trainer": ("trainer", "run the trainer in front, as a user of its own"),
    "join": ("act", "join the network"),
    "leave": ("act", "leave the network"),
    "share": ("act", "start or stop releasing updates (on, off)"),
    "block": ("act", "have no connection with a member"),
    "unblock": ("act", "have connections with it again"),
    "task": ("task", "this hospital's training: new, check, log, pause, resume"),
    "run": ("runs", "training runs: create, sign, show, accept, list"),
    "model": ("model", "the common model: fetch, export, evaluate, tune, pictures"),
    "predict": ("predict", "apply a model to new cases of this hospital"),
    "status": ("observe", "what this node does, on one screen"),
    "peers": ("observe", "the other members, or one of them; -w draws again and again"),
    "top": ("top", "all of it on one live screen"),
    "dashboard": ("dashboard", "all of it as a live page in a browser"),
    "report": ("report", "the same page, frozen into one file"),
    "privacy": ("privacy", "what was spent, and what is left; plan, ledger, audit"),
    "events": ("watch", "what happened; -f follows"),
    "monitor": ("monitor", "the daemon's log as it is written, at any level"),
    "wait": ("watch", "wait for peers, a round, a model, the end of the run"),
    "whoami": ("whoami", "this node's name, id and network; your rights on its socket"),
    "id": ("whoami", "this node's peer id, or what -f asks for"),
    "steward": ("steward", "keys, rosters and signatures of the stewards"),
    "invite": ("invite", "invite a hospital, and approve its answer; for stewards"),
    "roster": ("roster", "who may join: show, verify, diff, publish"),
    "bootstrap": ("bootstrap", "lists of the peers that are asked first"),
    "config": ("host", "the configuration: check, show, path, reload"),
    "demo": ("host", "five hospitals on this machine train one model"),
    "simulate": ("simulate", "play a scenario with simulated hospitals"),
    "doctor": ("doctor", "what is wrong on this machine, and how to mend it"),
    "bugreport": ("bugreport", "an archive for who helps you: no data, no keys, no ledger"),
    "version": ("observe", "versions of this program and of the daemon"),
    "completion": ("completion", "a script that completes commands in bash, zsh or fish"),
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
        return _tell(error, arguments)
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
        return _tell(bug, arguments)
    return code


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["__complete"]:  # asked at every press of the tab key
        from p2pfed.cli.complete import complete

        return complete(arguments[1:])
    top = Parser(prog="p2pfed", add_help=False)
    top.add_argument("-h", "--help", action="store_true")
    top.add_argument("--version", action="store_true")
    top.add_argument("--socket", metavar="PATH")
    top.add_argument("-c", "--config", metavar="FILE")
    top.add_argument("--json", action="store_true")
    top.add_argument("--no-color", action="store_true")
    top.add_argument("command", nargs="?")
    top.add_argument("rest", nargs=argparse.REMAINDER)
    given = top.parse_args(arguments)
    if given.version:
        print(f"p2pfed {__version__}")
        return 0
    if given.command == "help":
        given.command, *given.rest = [*given.rest, "-h"] if given.rest else [None]
        given.help = given.command is None
    if given.help or given.command is None:
        print(_overview())
        return 0 if given.help else 2
    parser = parser_of(given.command)
    defaults = argparse.Namespace(
        socket=given.socket, config=given.config, json=given.json, no_color=given.no_color
    )
    args = parser.parse_args(given.rest, namespace=defaults)
    if args.no_color:
        os.environ["NO_COLOR"] = "1"
    return int(args.run(args) or 0)


def parser_of(command: str) -> Parser:
    """The parser of a command, which only its own module is loaded for.

    Raises:
        ConfigError: There is no such command.
    """
    if command not in COMMANDS:
        raise _unknown(command)
    module = importlib.import_module(f"p2pfed.cli.{COMMANDS[command][0]}")
    parser = Parser(prog=f"p2pfed {command}")
    getattr(module, command)(parser)
    return parser


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: p2pfed [--socket PATH] [-c FILE] [--json] [--no-color] COMMAND ...",
            "",
            "Hospitals train one model together as peers, without a server.",
            "",
            *(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "p2pfed COMMAND -h explains a command. First steps: p2pfed init -h, or: p2pfed demo",
            "The options above may also stand after COMMAND; NO_COLOR is heeded.",
            "The daemon's socket: --socket, P2PFED_SOCKET, or as the configuration says, which is",
            "-c FILE, P2PFED_CONFIG, ./p2pfed.toml, ~/.config/p2pfed/ or /etc/p2pfed/p2pfed.toml.",
        ]
    )


def _unknown(command: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return ConfigError(
        f"there is no command {command!r}",
        f"did you mean {near[0]!r}?" if near else "no command has a name like it",
        "run: p2pfed -h",
    )


def _tell(error: P2PFedError, arguments: list[str]) -> int:
    from p2pfed.cli.text import envelope, printable

    told = three_lines(error, arguments)
    try:
        print("\n".join(printable(line) for line in str(told).splitlines()), file=sys.stderr)
        if any(word.partition("=")[0] == "--json" for word in arguments):
            problem = {"title": told.what, "detail": told.why, "hint": told.do}
            print(envelope("error", {**problem, "exit_code": error.exit_code}, ok=False))
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return error.exit_code


def three_lines(error: P2PFedError, arguments: list[str]) -> P2PFedError:
    """The error as it is told: what, why, what to do.

    Only `why` may have several lines: one for each mistake of a configuration.
    """
    why = error.why or _WHY.get(error.exit_code, "it gives no reason")
    what, do = (" ".join(text.split("\n")) for text in (error.what, error.do))
    return P2PFedError(what, why, do or _next_step(arguments))


# exit code -> why, where an error of a document or of the network does not say it itself
_WHY = {
    2: "an argument, or a file that it names, does not hold what is wanted there",
    4: "this user may not do it",
    5: "nothing is known under that name",
    6: "it did not come in time",
    7: "a document or a request is taken only if all of it is as the rules say",
    8: "the two programs do not understand each other",
}


def _next_step(arguments: list[str]) -> str:
    """What to do where an error does not say it itself."""
    command = next((word for word in arguments if word in COMMANDS), "")
    if command in {"node", "trainer"}:
        return "p2pfed doctor looks closer"
    return f"see: p2pfed {command} -h" if command else "see: p2pfed -h"
