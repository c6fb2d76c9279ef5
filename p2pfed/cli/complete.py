"""`p2pfed __complete SHELL WORD...`: what may stand in place of the last word, one line each.

It walks the parser of the command that the words name, so that nothing is written down twice. Of a
word that is no choice, its metavar or name says what it is. A line `:files` or `:folders` leaves it
to the shell.

Invariants: nothing is printed but candidates; whatever is wrong with the words, the socket or the
configuration, there are none. Only the command's own module is loaded.
"""

from __future__ import annotations

import argparse
from contextlib import suppress

from p2pfed.cli.main import COMMANDS, parser_of
from p2pfed.cli.text import printable
from p2pfed.errors import P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["candidates", "complete"]

PEERS_WITHIN_S = 0.3
GLOBALS = {"--socket": True, "-c": True, "--config": True, "--json": False, "--no-color": False}
SHELLS = ("bash", "zsh", "fish")


def complete(words: list[str]) -> int:
    """Print the candidates for the last of the words after the shell's name."""
    shell, *rest = words or [""]
    if shell not in SHELLS:
        return 2
    try:
        rest = _joined(rest) if shell == "bash" else rest
        found = candidates(rest or [""])
    except (P2PFedError, SystemExit, OSError):
        return 0
    word = rest[-1] if rest else ""
    # bash replaces only what follows the last = or : of a word
    start = 1 + max(word.rfind("="), word.rfind(":")) if shell == "bash" else 0
    for name in found:
        if printable(name) == name:
            print(name if name.startswith(":") else name[start:])
    return 0


def _joined(raw: list[str]) -> list[str]:
    """Bash's words without quotes; those that it had cut at = and : put together again."""
    words: list[str] = []
    glued = False
    for word in raw:
        mark = word != "" and not word.strip("=:")
        if words and (mark or glued):
            words[-1] += _unquoted(word)
        else:
            words.append(_unquoted(word))
        glued = mark
    return words


def _unquoted(word: str) -> str:
    if not set(word) & set("\\'\""):
        return word
    import shlex

    for closing in ("", "'", '"'):
        try:
            return "".join(shlex.split(word + closing))
        except ValueError:
            continue
    return word


def candidates(words: list[str]) -> list[str]:
    """What may stand in place of the last word, given those before it.

    Raises:
        P2PFedError: The words before make no sense.
    """
    *before, word = words
    before, known = _without_globals(before)
    if not before:
        if word.startswith("-"):
            return _beginning(word, [*GLOBALS, "--help", "--version"])
        return _beginning(word, [*COMMANDS, "help"])
    command, *rest = before
    if command == "help":
        return _beginning(word, [] if rest else COMMANDS)
    if command in GLOBALS:  # its value is being written
        return [":files"]
    return _Walk(parser_of(command), known).offer(rest, word)


def _without_globals(words: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The words from the command on, and what stood before it; an option without value stays."""
    known = argparse.Namespace(socket=None, config=None)
    while words and words[0].startswith("-"):
        name, given, value = words[0].partition("=")
        if GLOBALS.get(name) and not given:
            if len(words) < 2:
                return words, known
            value, words = words[1], words[1:]
        if GLOBALS.get(name):
            setattr(known, "socket" if name == "--socket" else "config", value)
        words = words[1:]
    return words, known


def _beginning(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word)]


class _Walk:
    """Where in a command's parser its words lead.

    Args:
        parser: Of the command.
        known: What is known of the daemon's socket; more may come from the words.
    """

    def __init__(self, parser: argparse.ArgumentParser, known: argparse.Namespace) -> None:
        self._known = known
        self._enter(parser)

    def _enter(self, parser: argparse.ArgumentParser) -> None:
        if getattr(parser, "module", ""):  # it learns its options when it is called
            with suppress(P2PFedError):  # it has learnt them, and misses an argument
                parser.parse_known_args([])
        self._options = {name: a for a in parser._actions for name in a.option_strings}  # noqa: SLF001 - argparse has no other way to ask
        self._places = [a for a in parser._actions if not a.option_strings]  # noqa: SLF001

    def offer(self, before: list[str], word: str) -> list[str]:
        """The candidates for `word` behind the words `before`."""
        words, literal = list(before), False
        while words:
            text = words.pop(0)
            if text == "--" and not literal:
                literal = True
            elif text.startswith("-") and len(text) > 1 and not literal:
                action = self._options.get(text.partition("=")[0])
                if action is None or action.nargs == 0 or "=" in text:
                    continue
                if not words:
                    return self._values(action, word)
                self._note(action, words.pop(0))
            else:
                self._pass(text)
        if word.startswith("-") and not literal:
            return self._of_option(word)
        return self._values(self._places[0], word) if self._places else []

    def _pass(self, text: str) -> None:
        """A word at a place of its own: a subcommand, or a value."""
        if not self._places:
            return
        action = self._places[0]
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            sub = action.choices.get(text)
            if sub is None:
                self._options, self._places = {}, []
            else:
                self._enter(sub)
        elif action.nargs not in {"*", "+", argparse.REMAINDER}:
            self._places = self._places[1:]

    def _note(self, action: argparse.Action, value: str) -> None:
        if action.dest in {"socket", "config"}:
            setattr(self._known, action.dest, value)

    def _of_option(self, word: str) -> list[str]:
        name, given, value = word.partition("=")
        action = self._options.get(name)
        if given and action is not None:
            found = self._values(action, value)
            return [item if item.startswith(":") else f"{name}={item}" for item in found]
        shown = [n for n, a in self._options.items() if a.help != argparse.SUPPRESS]
        return _beginning(word, shown)

    def _values(self, action: argparse.Action, word: str) -> list[str]:
        if action.choices is not None:
            return _beginning(word, map(str, action.choices))
        kind = _KINDS.get(action.dest) or _KINDS.get(str(action.metavar)) or ""
        if isinstance(kind, str):
            return [kind] if kind else []
        return _beginning(word, kind(self._known))


# --- what is no choice -------------------------------------------------------------------------


def _peers(known: argparse.Namespace) -> list[str]:
    from p2pfed.cli.locate import admin_client

    found = admin_client(known, timeout=PEERS_WITHIN_S).get("/v1/peers")
    return [str(peer["name"]) for peer in found]


def _tasks(_: argparse.Namespace) -> list[str]:
    """The bundled tasks, by the names of the table in p2pfed.tasks, which is not loaded."""
    import ast
    from importlib.util import find_spec

    spec = find_spec("p2pfed.tasks")
    if spec is None or spec.origin is None:
        return []
    with open(spec.origin, encoding="utf-8") as file:  # noqa: PTH123 - pathlib costs its time
        tree = ast.parse(file.read())
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
    return [str(key.value) for key in keys if isinstance(key, ast.Constant)]


def _conditions(_: argparse.Namespace) -> list[str]:
    from p2pfed.cli.watch import CONDITIONS

    return [f"{what}={'' if value == 'N' else value}" for what, value in CONDITIONS.items()]


def _event_kinds(_: argparse.Namespace) -> list[str]:
    return ["node.*", "peer.*", "roster.*", "run.*", "round.*", "task.*", "privacy.*", "sharing.*"]


# An argument's name or metavar -> a function that lists, or what the shell lists.
_KINDS: dict[str, Callable[[argparse.Namespace], list[str]] | str] = {
    "peer": _peers,
    "task": _tasks,
    "conditions": _conditions,
    "type": _event_kinds,
    **dict.fromkeys(
        ("FILE", "PATH", "OUT", "KEYFILE", "ROSTER", "NEXT", "OLD", "REQUEST", "EXPORT"), ":files"
    ),
    "DIR": ":folders",
    "FOLDER": ":folders",
}
