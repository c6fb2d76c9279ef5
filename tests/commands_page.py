"""Prints docs/commands.md from the parsers: `python tests/commands_page.py > docs/commands.md`.

What a parser does not know stands here: the schema of each command's JSON, and the exit codes that
mean something of its own. `test_cli_schemas` holds the page and these tables against the program.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator

from p2pfed.cli.main import COMMANDS, parser_of
from p2pfed.errors import P2PFedError

# command -> schema of its --json, without `p2pfed.` and version; a stream's lines have none
SCHEMAS = {
    "init": "init",
    "join": "join",
    "leave": "leave",
    "share": "share",
    "block": "block",
    "unblock": "block",
    "task new": "task-new",
    "task check": "task-check",
    "task log": "task-log",
    "task pause": "task",
    "task resume": "task",
    "run create": "run-create",
    "run sign": "run-sign",
    "run show": "run",
    "run accept": "run-accept",
    "run list": "runs",
    "model fetch": "model",
    "model export": "model-export",
    "model evaluate": "model-evaluate",
    "model tune": "model-tune",
    "model pictures": "model-pictures",
    "predict": "predict",
    "status": "status",
    "peers": "peers, or peer with PEER",
    "privacy": "privacy",
    "privacy plan": "privacy-plan",
    "privacy ledger": "privacy-ledger",
    "privacy audit": "privacy-audit",
    "events": "one event per line",
    "monitor": "one line of the log per line",
    "wait": "wait",
    "whoami": "whoami",
    "id": "whoami",
    "steward key": "steward-key",
    **{f"steward {verb}": "roster" for verb in ("found", "sign", "verify", "show")},
    **{f"steward {verb}": "roster" for verb in ("add", "revoke", "rotate", "extend")},
    "invite create": "invite",
    "invite list": "invites",
    "invite revoke": "invite",
    "invite approve": "roster",
    "roster show": "roster",
    "roster verify": "roster",
    "roster diff": "roster-diff",
    "roster publish": "roster-publish",
    "dashboard": "dashboard",
    "report": "report",
    "doctor": "doctor",
    "bugreport": "bugreport",
    "demo": "demo",
    "simulate": "simulation, into a file or with -",
    "bootstrap list": "bootstrap",
    "bootstrap add": "bootstrap-file",
    "bootstrap rm": "bootstrap-file",
    "bootstrap check": "bootstrap",
    "config check": "config-check",
    "config show": "config",
    "config path": "config-path",
    "config reload": "config-reload",
    "version": "version",
}

# command -> exit codes with a meaning of their own
CODES = {
    "status": "1: the node has left the network",
    "wait": "6: not within the time; 3: no daemon at its end",
    "task check": "1: a step failed",
    "doctor": "9: a check failed",
    "privacy audit": "1: a claim did not hold",
    "top": "143: ended by SIGTERM",
}

HEAD = """\
# The commands

Every command that asks the daemon is one call of its socket, or a few; its endpoint is named here
and in `p2pfed COMMAND -h`. [operations.md](operations.md) has the sockets themselves, and what each
exit code means to whoever runs the node.

Standard output holds data, standard error everything else. An error is three lines: what happened,
why, what to do; where a configuration has several mistakes, there is a line of why for each.

- `--socket PATH` (`P2PFED_SOCKET`), `-c FILE` (`P2PFED_CONFIG`), `--json` and `--no-color`
  (`NO_COLOR`) may stand before the command or after it.
- `--json` prints one envelope, `{"schema": "p2pfed.NAME/1", "ok": true, "data": ...}`; an error is
  one of `p2pfed.error/1` with `"ok": false`. `ok` is true exactly where the exit code is 0. Fields
  are added without notice. When one is taken away or gets another type, the number behind the
  stroke grows. Commands that follow something print one JSON object per line. It is ASCII, a number
  that is not finite is null, a time is UTC (`2027-01-31T00:00:00Z`; only a ledger's record has its
  `at` in Unix time), and a number's unit is in its name (`uptime_s`, `sent_bytes`).
- `p2pfed help COMMAND` is `p2pfed COMMAND -h`. `p2pfed completion bash` (or zsh, fish) prints the
  script for the tab key.
- `peers -w` draws again and again, `top` is a live screen, `events -f` and `monitor` follow; all
  end with Ctrl-C.

Exit codes: 0 done, 1 failed, 2 wrong arguments or configuration, 3 no daemon, 4 not permitted, 5 no
such peer, run or endpoint, 6 too slow, 7 refused by policy, 8 the versions do not fit, 9 a check of
`doctor` failed, 130 Ctrl-C. Where a command gives one of them a meaning of its own, the table says
so.

| command | what it does | endpoint | schema of `--json` | exit codes of its own |
|---|---|---|---|---|
"""


TAIL = """
## Where the things are that you may look for

| you look for | here it is |
|---|---|
"""

# what is called so elsewhere -> what does the same here
ELSEWHERE = {
    "put a member out (`force-leave`)": "for everyone: `p2pfed steward revoke ROSTER NAME"
    " --reason WHY --from-round R --out NEXT`, then its signatures; at this node:"
    " `p2pfed block PEER`",
    "leave once a round is over (`leave --drain`)": "`p2pfed share off`, then `p2pfed leave`; what"
    " was released goes on spreading without this node",
    "`task start`, `task list`, `task stop`": "`p2pfed run accept FILE`, `p2pfed run list`;"
    " `p2pfed share off` or `p2pfed task pause`",
    "overwrite a node (`init --force`)": "nothing is overwritten: move the folder away, or choose"
    " another `--dir`",
    "say more or less (`-v`, `-q`), set the level by the socket": "`p2pfed monitor --level debug`"
    " for you alone; `log.level` in the configuration, then `p2pfed config reload`",
    "end the daemon by the socket": "by a signal: `systemctl stop p2pfed`, Ctrl-C or SIGTERM; no"
    " endpoint ends it",
    "a demo with another number of hospitals": "`p2pfed demo` has five, each with a part to play;"
    " `p2pfed simulate` has any number",
}


def leaves() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Every command that can be run: its words, its line of help, its parser."""
    for command, (_, text) in COMMANDS.items():
        yield from _below(command, text, parser_of(command))


def _below(
    words: str, text: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    if getattr(parser, "module", ""):  # it learns its options when it is called
        with contextlib.suppress(P2PFedError):
            parser.parse_known_args([])
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups or parser.get_default("run") is not None:
        yield words, text, parser
    for group in groups:
        helps = {action.dest: action.help or "" for action in group._choices_actions}
        for name, sub in group.choices.items():
            yield from _below(f"{words} {name}", helps.get(name, ""), sub)


def endpoint(parser: argparse.ArgumentParser) -> str:
    """What the command's help calls its endpoint, on one line."""
    return " ".join((parser.epilog or "").removeprefix("endpoint:").split())


def page() -> str:
    """The whole page."""
    rows = []
    for words, text, parser in leaves():
        cells = (f"`{words}`", text, endpoint(parser), SCHEMAS.get(words, ""), CODES.get(words, ""))
        rows.append("| " + " | ".join(re.sub(r"\|", r"\\|", cell) or "-" for cell in cells) + " |")
    elsewhere = [f"| {what} | {here} |" for what, here in ELSEWHERE.items()]
    return HEAD + "\n".join(rows) + "\n" + TAIL + "\n".join(elsewhere) + "\n"


if __name__ == "__main__":
    print(page(), end="")
