"""init, node, config, demo: commands that work on this machine without asking a daemon."""

from __future__ import annotations

import sys
from pathlib import Path

from p2pfed.cli.locate import config_path
from p2pfed.cli.options import describe, with_json
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from p2pfed.config import Settings

__all__ = ["config", "demo", "init", "node"]


# --- init --------------------------------------------------------------------------------------


def init(parser: ArgumentParser) -> None:
    """Fill in the command `init`."""
    describe(
        parser,
        "Make this node's key (0600) and a commented configuration in one folder (0700), and\n"
        "print the line that the stewards need. Nothing is ever overwritten.",
    )
    parser.add_argument("--name", required=True, help="what the others call this hospital")
    parser.add_argument(
        "--dir", metavar="DIR", help="default: /etc/p2pfed for root, else ~/.config/p2pfed"
    )
    parser.add_argument("--listen", metavar="MULTIADDR", action="append", help="repeatable")
    parser.add_argument(
        "--task", default="", help="task to train; without it: a bootstrap-only node"
    )
    parser.add_argument("--data", metavar="PATH", help="this hospital's data, for the task")
    parser.add_argument(
        "--epsilon", help="lifetime privacy budget of the data set; needed to train"
    )
    parser.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="what the task wants to know of this hospital; repeatable",
    )
    with_json(parser)
    parser.set_defaults(run=_init)


def _init(args: Namespace) -> None:
    from p2pfed.cli.template import configuration
    from p2pfed.config import default_state_dir, load_settings
    from p2pfed.identity.keys import NodeKey, write_private

    folder = _folder(args.dir)
    key_file, config_file = folder / "node.key", folder / "p2pfed.toml"
    for path in (key_file, config_file):
        if path.exists():
            raise ConfigError(
                f"{path} exists already", "nothing is overwritten", "choose another --dir"
            )
    text = configuration(
        name=args.name,
        listen=args.listen or ["/ip4/0.0.0.0/tcp/4201"],
        task=args.task,
        data=None if args.data is None else str(Path(args.data).absolute()),
        epsilon=args.epsilon,
        options=dict(_option(text) for text in args.option),
        ledger=str(default_state_dir() / "ledger.db") if args.task else None,
    )
    write_private(config_file, text.encode())
    try:
        settings = load_settings(config_file)
        key = NodeKey.create(key_file)
    except BaseException:
        config_file.unlink()
        raise
    data = {
        "name": args.name,
        "peer_id": key.peer_id,
        "key": str(key_file),
        "config": str(config_file),
        "socket": str(settings.admin_socket),
    }
    emit(args, "init", data, _next_steps(args, data))


def _option(text: str) -> tuple[str, str | int]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"--option {text!r} is not KEY=VALUE", "", "e.g. --option site=0")
    return key, int(value) if value.isascii() and value.isdigit() else value


def _next_steps(args: Namespace, made: dict[str, str]) -> list[str]:
    import shlex

    roles = "train,relay" if args.task else "bootstrap,relay"
    samples = "N" if args.task else "0"
    return [
        f"peer id  {made['peer_id']}",
        f"key      {made['key']}   (0600; keep a copy in a safe)",
        f"config   {made['config']}",
        "",
        "Send this line to the stewards (N = the number of patients that you train on):",
        f"  p2pfed steward add ROSTER --name {shlex.quote(args.name)} --peer-id {made['peer_id']}"
        f" --roles {roles} --samples {samples} --out NEXT",
        "Then:",
        *(
            []
            if args.task
            else ["  to train: set [train] and privacy.epsilon in the configuration"]
        ),
        f"  p2pfed node -c {shlex.quote(made['config'])}",
        f"  p2pfed -c {shlex.quote(made['config'])} join --roster FILE --bootstrap FILE"
        "   (both from the stewards)",
    ]


def _folder(given: str | None) -> Path:
    import os

    system = os.geteuid() == 0
    default = Path("/etc/p2pfed") if system else Path("~/.config/p2pfed").expanduser()
    folder = Path(given) if given else default
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
        raise ConfigError(f"cannot make the folder {folder}", error.strerror or "") from error
    return folder.absolute()


# --- node --------------------------------------------------------------------------------------


def node(parser: ArgumentParser) -> None:
    """Fill in the command `node`."""
    describe(
        parser,
        "Run the daemon in front. It ends with a graceful good-bye on SIGINT and SIGTERM, and\n"
        "takes up its work again after a crash.",
    )
    import argparse

    parser.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS)
    parser.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS)
    parser.set_defaults(run=_node)


def _node(args: Namespace) -> int:
    settings = _settings(args, None)
    # It pulls in trio and libp2p; only after the configuration is known to be right.
    from p2pfed.node.daemon import run_node

    return run_node(settings)


def _settings(args: Namespace, file: str | None) -> Settings:
    from p2pfed.config import load_settings

    path = Path(file) if file else config_path(args)
    if path is None:
        raise ConfigError(
            "no configuration found",
            "not here, not in ~/.config/p2pfed, not in /etc/p2pfed",
            "run: p2pfed init --name NAME --dir DIR   (or name one: -c FILE)",
        )
    return load_settings(path, flags={"admin.socket": args.socket} if args.socket else None)


# --- config ------------------------------------------------------------------------------------


def config(parser: ArgumentParser) -> None:
    """Fill in the command group `config`."""
    describe(parser, "Check a configuration, or show it with all defaults filled in.")
    actions = parser.add_subparsers(metavar="check|show", required=True)
    for name, text in (("check", "is it right?"), ("show", "with all defaults filled in")):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("file", nargs="?", metavar="FILE")
        with_json(action)
        action.set_defaults(run=_check_config if name == "check" else _show_config)


def _check_config(args: Namespace) -> None:
    settings = _settings(args, args.file)
    data = {"name": settings.node.name, "data_dir": str(settings.node.data_dir)}
    emit(args, "config", data, [f"the configuration of {settings.node.name} is right"])


def _show_config(args: Namespace) -> None:
    settings = _settings(args, args.file)
    data = settings.model_dump(mode="json")
    data["admin"]["socket"] = str(settings.admin_socket)
    data["train"]["socket"] = str(settings.trainer_socket)
    data["privacy"]["ledger"] = str(settings.ledger_path)
    lines = []
    for section, values in data.items():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    emit(args, "config", data, lines[:-1])


def _toml(value: object) -> str:
    import json

    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return '""' if value is None else json.dumps(value, ensure_ascii=False)


# --- demo --------------------------------------------------------------------------------------


def demo(parser: ArgumentParser) -> None:
    """Fill in the command `demo`."""
    describe(
        parser,
        "Five real daemons on this machine train one model. On the way one is killed and comes\n"
        "back, one joins late, one leaves for good. Exit 1 if the hospitals' models differ.",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="the four UCI heart disease files (default: breast cancer)"
    )
    parser.add_argument("--nodes", type=int, default=5, choices=(5,), help="always 5")
    parser.add_argument(
        "--seed", type=int, default=0, help="of data splits and training (default 0)"
    )
    parser.add_argument("--out", metavar="DIR", default="p2pfed-demo", help="default: p2pfed-demo")
    parser.add_argument("--epsilon", default="10", help="whole run, per patient (default 10)")
    parser.add_argument("--rounds", type=int, default=None, help="default: what the task needs")
    with_json(parser)
    parser.set_defaults(run=_demo)


def _demo(args: Namespace) -> int:
    from p2pfed.demo.story import run_demo

    options = {
        key: getattr(args, key) for key in ("data", "nodes", "seed", "out", "epsilon", "rounds")
    }
    sys.stdout.flush()
    return run_demo({**options, "json": args.json})
