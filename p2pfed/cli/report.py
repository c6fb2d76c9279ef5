"""report: the dashboard's page with its data, frozen into one file.

Invariants. The file refers to nothing outside itself and its content policy allows nothing else.
What is private (this hospital's measures, pictures of its patients) is in it only where that was
asked for by name; addresses, users and paths of machines never are. It is 0600, below a megabyte,
and there whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path

from p2pfed.cli.dashboard import FILES, board_file, board_of, shown_pictures, with_evaluation
from p2pfed.cli.locate import admin_client
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.text import emit, size
from p2pfed.errors import ConfigError, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["MOST_BYTES", "frozen_page", "report"]

MOST_BYTES = 1_000_000
_OF_PEOPLE = ("admin.", "config.")  # events that tell who works at this machine
_PATH = re.compile(r"(?<![\w/])/(?:[^\s/'\":;]+/)*[^\s/'\":;]+")
_HISTORIES = (2000, 500, 100, 20)  # rounds; the most that fit are kept


def report(parser: ArgumentParser) -> None:
    """Fill in the command `report`."""
    describe(
        parser,
        "Write the dashboard's page as it is now to one HTML file, below a megabyte, that needs\n"
        "no network. What is private is left out, unless you ask for it: then keep the file here.",
        endpoint="as p2pfed dashboard",
    )
    parser.add_argument(
        "-o", "--out", default="report.html", metavar="FILE", help="not overwritten"
    )
    parser.add_argument(
        "--include-private",
        action="store_true",
        help="with this hospital's own measures of the model, times and ledger",
    )
    parser.add_argument(
        "--include-images", action="store_true", help="with pictures of this hospital's patients"
    )
    with_evaluation(parser)
    with_socket(parser)
    parser.set_defaults(run=_report)


def _report(args: Namespace) -> None:
    from p2pfed.cli.board_data import recent_events

    target = Path(args.out)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already", "nothing is overwritten", "name a new file")
    snapshot = board_of(args).snapshot(fresh=True)
    data = public_part(snapshot, recent_events(admin_client(args)))
    if args.include_private:
        data["private"] = snapshot["private"]
    if args.include_images:
        data["pictures"] = _pictures(args)
    page = frozen_page(data)
    _write(target, page)
    inside = _inside(data)
    emit(
        args,
        "report",
        {"file": str(target), "file_bytes": len(page), **inside},
        [
            f"{target}   {size(len(page))}",
            f"in it: {', '.join(inside['included'])}",
            f"not in it: {', '.join(inside['left_out'])}",
            *(["it tells of this hospital's patients: keep it here"] * inside["private"]),
        ],
    )


def public_part(snapshot: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """What may be in every report: no private numbers, no addresses, users or paths of machines."""
    status = {k: v for k, v in (snapshot["status"] or {}).items() if k not in {"addresses", "pid"}}
    trainer = {k: v for k, v in (status.get("trainer") or {}).items() if k != "pid"}
    return {
        **snapshot,
        "frozen": True,
        "status": {**status, "trainer": trainer, "health": _blotted(status.get("health", []))},
        "peers": [{k: v for k, v in p.items() if k != "addresses"} for p in snapshot["peers"]],
        "private": None,
        "pictures": None,
        "events": [
            {**e, "data": _blotted({k: v for k, v in e["data"].items() if k != "addresses"})}
            for e in events
            if not e["type"].startswith(_OF_PEOPLE)
        ],
    }


def _blotted(value: Any) -> Any:
    """The same without a path of this machine in any of its texts."""
    if isinstance(value, str):
        return _PATH.sub("…", value)
    if isinstance(value, list):
        return [_blotted(item) for item in value]
    if isinstance(value, dict):
        return {key: _blotted(item) for key, item in value.items()}
    return value


def frozen_page(data: dict[str, Any]) -> bytes:
    """The page with its data in it; the oldest rounds are left out where it would be too long.

    Args:
        data: A snapshot of the board with `frozen`, `events` and `pictures`.

    Raises:
        ConfigError: It does not fit into a megabyte, which pictures alone can cause.
    """
    page = b""
    for pictures in _fewer(data.get("pictures")):
        for rounds in _HISTORIES:
            page = _page({**_shortened(data, rounds), "pictures": pictures})
            if len(page) < MOST_BYTES:
                return page
    raise ConfigError(
        f"the report would be {size(len(page))} long",
        f"{size(MOST_BYTES)} are the most",
        "leave out --include-images, and see: p2pfed model pictures",
    )


def _fewer(pictures: dict[str, Any] | None) -> Iterator[dict[str, Any] | None]:
    """The pictures, then with one slice a plane, then of the median case alone."""
    yield pictures
    if pictures:
        from p2pfed.cli.planes import middles

        cases = middles(pictures["cases"])
        yield {**pictures, "cases": cases}
        yield {**pictures, "cases": [c for c in cases if c["rank"] == "median"] or cases[:1]}


def _shortened(data: dict[str, Any], rounds: int) -> dict[str, Any]:
    short, history, private = dict(data), data.get("history"), data.get("private")
    if history:
        short["history"] = {**history, "history": history["history"][-rounds:]}
    if private:
        short["private"] = {**private, "metrics": private["metrics"][-rounds:]}
    short["measures"] = {peer: told[-rounds:] for peer, told in data["measures"].items()}
    return short


def _page(data: dict[str, Any]) -> bytes:
    text = board_file("index.html").decode()
    style = board_file("board.css").decode()
    scripts = {name: board_file(name).decode() for name in FILES if name.endswith(".js")}
    allowed = " ".join(_hash(script) for script in scripts.values())
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    text = _put(text, '<meta charset="utf-8">', f'<meta charset="utf-8">{_policy_tag(policy)}')
    text = _put(text, '<link rel="stylesheet" href="board.css">', f"<style>{style}</style>")
    shown = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    shown = shown.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    held = f'<script type="application/json" id="frozen">{shown}</script>'
    for name, script in scripts.items():
        tag = f'<script src="{name}" defer></script>'
        # a script in the page cannot be deferred: all of them stand at its end
        text = _put(text, tag, "")
        held += f"<script>{script}</script>"
    return _put(text, "</body>", f"{held}</body>").encode("utf-8", "replace")


def _policy_tag(policy: str) -> str:
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def _put(text: str, place: str, new: str) -> str:
    head, found, tail = text.rpartition(place)
    assert found, place
    return head + new + tail


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _pictures(args: Namespace) -> dict[str, Any]:
    shown = shown_pictures(args)
    if "trouble" in shown:
        raise NotFound("there are no pictures to include", shown["trouble"], "leave out the option")
    return shown


def _inside(data: dict[str, Any]) -> dict[str, Any]:
    """What is in the file and what is not, in words."""
    public = ["state of the network, peers, rounds, bytes, events and what was spent"]
    measures, pictures = "this hospital's own measures", "pictures of patients"
    has = {measures: bool(data.get("private")), pictures: bool(data.get("pictures"))}
    return {
        "included": public + [what for what, there in has.items() if there],
        "left_out": [what for what, there in has.items() if not there] + ["machines' addresses"],
        "private": any(has.values()),
    }


def _write(target: Path, data: bytes) -> None:
    """Write beside the place, then give it the name, which must be free; 0600."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(aside, target)  # unlike a rename it does not replace
        finally:
            aside.unlink()
    except FileExistsError as error:
        raise ConfigError(f"{target} exists already", "nothing is overwritten") from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {target}",
            error.strerror or str(error),
            "make room there, or name another place: -o FILE",
        ) from error
