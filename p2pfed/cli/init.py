"""init: this node's key and configuration in one folder, and the line that the stewards need.

Map: what the arguments forbid together (`_check_together`) -> the invite, if there is one -> the
folder -> the configuration, which must load -> the key -> the answer to the invite (`enrol`).

Invariant: all or nothing. Nothing is overwritten, and where anything is wrong no file and no folder
that was not there before is left.

Not here: the text of the configuration (`template`), what comes after it (`enrol`).
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path

from p2pfed.cli.options import describe, with_json
from p2pfed.cli.task_options import option_flag
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator

    from p2pfed.config import Settings
    from p2pfed.identity.invite import Invite
    from p2pfed.identity.keys import NodeKey

__all__ = ["init"]


def init(parser: ArgumentParser) -> None:
    """Fill in the command `init`."""
    describe(
        parser,
        "Make this node's key (0600) and a commented configuration in one folder (0700), and\n"
        "print the line that the stewards need: with an invite, the answer to it. The key never\n"
        "leaves this machine. Nothing is ever overwritten.",
    )
    parser.add_argument("--name", help="what the others call this hospital; an invite says it")
    parser.add_argument(
        "--invite", metavar="INVITE", help="p2pfed1-..., from a steward, or the file that holds it"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="patients that you train on; its weight, public"
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="default: /etc/p2pfed for root, else ~/.config/p2pfed"
    )
    parser.add_argument("--listen", metavar="MULTIADDR", action="append", help="repeatable")
    parser.add_argument(
        "--announce",
        metavar="MULTIADDR",
        action="append",
        default=[],
        help="where others can dial this node, if they can; goes to the steward; repeatable",
    )
    parser.add_argument(
        "--task", default="", help="task to train; without it: a bootstrap-only node"
    )
    parser.add_argument("--data", metavar="PATH", help="this hospital's data, for the task")
    parser.add_argument(
        "--epsilon", help="lifetime privacy budget of the data set; needed to train"
    )
    option_flag(parser, "what the task wants to know of this hospital; repeatable")
    with_json(parser)
    parser.set_defaults(run=_init)


def _init(args: Namespace) -> None:
    from p2pfed.cli.enrol import next_steps
    from p2pfed.config import default_state_dir

    _check_together(args)
    invite = _invite(args)
    ledger = default_state_dir() / "ledger.db" if args.task else None
    folder = _wanted(args.dir)
    with _no_folder_left(folder, *([] if ledger is None else [ledger.parent])):
        _make_private(folder)
        data = _made(args, invite, folder, ledger)
    emit(args, "init", data, next_steps(args, data))


def _made(
    args: Namespace, invite: Invite | None, folder: Path, ledger: Path | None
) -> dict[str, str]:
    """Write all files; what the command prints as JSON."""
    from p2pfed.cli.template import configuration
    from p2pfed.identity.keys import NodeKey, write_private

    key_file, config_file = folder / "node.key", folder / "p2pfed.toml"
    for path in (key_file, config_file):
        if path.exists():
            raise ConfigError(
                f"{path} exists already", "nothing is overwritten", "choose another --dir"
            )
    text = configuration(
        name=args.name,
        listen=args.listen or ["/ip4/0.0.0.0/tcp/4201"],
        announce=args.announce,
        network_id=invite.network_id.hex() if invite else "",
        task=args.task,
        data=None if args.data is None else str(Path(args.data).absolute()),
        epsilon=args.epsilon,
        options=dict(_option(text) for text in args.option),
        ledger=None if ledger is None else str(ledger),
    )
    write_private(config_file, text.encode())
    key = None
    try:
        settings = _settled(config_file)
        if ledger is not None:
            _make_room(ledger)
        key = NodeKey.create(key_file)
        asked = {} if invite is None else _answer(args, invite, key, folder)
    except BaseException:  # what was made a moment ago has been given to nobody
        config_file.unlink()
        if key is not None:
            key_file.unlink()
        raise
    return {
        "name": args.name,
        "peer_id": key.peer_id,
        "key": str(key_file),
        "config": str(config_file),
        "socket": str(settings.admin_socket),
        **asked,
    }


def _settled(made: Path) -> Settings:
    """The settings of a configuration that was made of the arguments a moment ago.

    Raises:
        ConfigError: The arguments make a wrong one.
    """
    from p2pfed.config import load_settings

    try:
        return load_settings(made)
    except ConfigError as error:
        raise ConfigError(
            error.what.replace(str(made), "the configuration that these arguments make"),
            error.why,
            "nothing was written; correct the arguments: p2pfed init -h",
        ) from error


# --- what goes together ------------------------------------------------------------------------


def _check_together(args: Namespace) -> None:
    """Raise ConfigError for arguments that say nothing, or the wrong thing, with the others."""
    given = {
        "--samples": args.samples is not None,
        "--data": args.data is not None,
        "--epsilon": args.epsilon is not None,
        "--option": bool(args.option),
    }
    useless = [flag for flag, there in given.items() if there and not args.task]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)} without --task",
            "without a task this becomes a bootstrap-only node, which trains on no data",
            f"add --task TASK; or, for a bootstrap-only node, leave {', '.join(useless)} away",
        )
    if args.samples is not None and args.samples < 1:
        raise ConfigError(
            f"--samples {args.samples}",
            "a hospital that trains has patients",
            "give the number of patients that you train on: --samples N",
        )
    for address in args.announce:
        if "/p2p/" in address:
            raise ConfigError(
                f"--announce {address} names a peer id",
                "this node's own id is made now, and is added to its addresses by itself",
                f"give --announce {address.partition('/p2p/')[0]}",
            )


def _invite(args: Namespace) -> Invite | None:
    """The invite, and what must go with it; it also gives the name."""
    if args.invite is None:
        if args.name is None:
            raise ConfigError(
                "--name is missing",
                "the others know a hospital by its name in the roster; an invite says it as well",
                "give --name NAME, or --invite INVITE",
            )
        return None
    from p2pfed.cli.enrol import read_invite

    if args.task and args.samples is None:
        raise ConfigError(
            "--samples is missing",
            "the number of patients that you train on stands in the roster, as your weight",
            "give --samples N",
        )
    invite = read_invite(args.invite, args.name)
    args.name = invite.name
    return invite


def _answer(args: Namespace, invite: Invite, key: NodeKey, folder: Path) -> dict[str, str]:
    from p2pfed.cli.enrol import write_request

    return write_request(
        folder,
        invite,
        key,
        samples=args.samples if args.task else 0,
        trains=bool(args.task),
        at=args.announce,
    )


def _option(text: str) -> tuple[str, str | int]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(
            f"--option {text!r} is not KEY=VALUE",
            "an option is a name and what the task gets under it",
            "e.g. --option site=0",
        )
    return key, int(value) if value.isascii() and value.isdigit() else value


# --- folders -----------------------------------------------------------------------------------


@contextmanager
def _no_folder_left(*folders: Path) -> Iterator[None]:
    """Where the block fails, take away the empty folders among these that were not there before."""
    each = [folder for path in folders for folder in (path, *path.parents)]
    # Path.exists raises below a folder that is closed to us.
    absent = [folder for folder in each if not os.path.exists(folder)]  # noqa: PTH110
    try:
        yield
    except BaseException:
        for folder in absent:
            with suppress(OSError):  # the deepest comes first; one that is not empty stays
                folder.rmdir()
        raise


def _wanted(given: str | None) -> Path:
    system = os.geteuid() == 0
    default = Path("/etc/p2pfed") if system else Path("~/.config/p2pfed").expanduser()
    return (Path(given) if given else default).absolute()


def _make_private(folder: Path) -> None:
    """Make a node's folder, 0700, or see that the one there is nobody else's to look into."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if folder.stat().st_mode & 0o077:
                if any(folder.iterdir()):
                    raise ConfigError(
                        f"others may look into {folder}",
                        "a node's folder holds its key and must be 0700",
                        f"run: chmod 700 {folder}   (or choose another --dir)",
                    ) from None
                folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}",
            error.strerror or str(error),
            "choose a --dir that you may write to",
        ) from error


def _make_room(ledger: Path) -> None:
    """Make the ledger's folder; the trainer makes the ledger, but no folder for it."""
    try:
        ledger.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {ledger.parent} for the privacy ledger",
            error.strerror or str(error),
            "run init as the user whom the node will run as, or set P2PFED_HOME",
        ) from error
