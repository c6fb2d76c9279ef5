"""node, config, demo: commands that work on this machine without asking a daemon."""

from __future__ import annotations

import sys
from pathlib import Path

from p2pfed.cli.locate import admin_client, config_path
from p2pfed.cli.options import describe, with_json, with_socket
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError, P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from p2pfed.config import Settings

__all__ = ["config", "demo", "node"]


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
    try:
        from p2pfed.node.daemon import run_node
    except Exception as error:
        if type(error).__name__ != "NoResolverConfiguration":
            raise
        raise P2PFedError(  # and no ConfigError: at boot it may come, and the unit tries again
            "this machine knows no name server, without which libp2p does not start",
            "/etc/resolv.conf is missing or names none",
            "write one there (nameserver 127.0.0.1 will do where all addresses are numbers)",
        ) from error

    return run_node(settings)


def _settings(args: Namespace, file: str | None) -> Settings:
    from p2pfed.config import load_settings

    flags = {"admin.socket": args.socket} if args.socket else None
    return load_settings(_path(args, file), flags=flags)


def _path(args: Namespace, file: str | None) -> Path:
    path = Path(file) if file else config_path(args)
    if path is None:
        raise ConfigError(
            "no configuration found",
            "not here, not in ~/.config/p2pfed, not in /etc/p2pfed",
            "run: p2pfed init --name NAME --dir DIR   (or name one: -c FILE)",
        )
    return path


# --- config ------------------------------------------------------------------------------------


def config(parser: ArgumentParser) -> None:
    """Fill in the command group `config`."""
    describe(
        parser,
        "Check a configuration, show it with all defaults filled in, say which file it is; or\n"
        "have the running daemon read its own again.",
    )
    actions = parser.add_subparsers(metavar="check|show|path|reload", required=True)
    for name, text in (("check", "is it right?"), ("show", "with all defaults filled in")):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("file", nargs="?", metavar="FILE")
        with_json(action)
        action.set_defaults(run=_check_config if name == "check" else _show_config)
    action = actions.add_parser("path", help="which file is it?")
    describe(action, "The configuration file that commands use here.")
    with_json(action)
    action.set_defaults(run=_config_path)
    action = actions.add_parser("reload", help="have the daemon read its file again")
    describe(
        action,
        "Have the daemon read its configuration file again. What can change at once does; the\n"
        "answer names what waits for a new trainer or a new start of the daemon. A file that is\n"
        "wrong changes nothing. SIGHUP to the daemon does the same. A new privacy budget counts\n"
        "from the trainer's next start: p2pfed task pause, then p2pfed task resume.",
        endpoint="POST /v1/reload",
    )
    with_socket(action)
    action.set_defaults(run=_reload_config)


def _check_config(args: Namespace) -> None:
    settings = _settings(args, args.file)
    data = {"name": settings.node.name, "data_dir": str(settings.node.data_dir)}
    emit(args, "config-check", data, [f"the configuration of {settings.node.name} is right"])


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


def _config_path(args: Namespace) -> None:
    path = _path(args, None)
    emit(args, "config-path", {"path": str(path)}, [str(path)])


def _reload_config(args: Namespace) -> None:
    told = admin_client(args).post("/v1/reload")
    lines = [f"in force now: {key}" for key in told["applied"]]
    lines += [f"with the next trainer: {key}" for key in told["restart_trainer"]]
    lines += [f"with the next start of the daemon: {key}" for key in told["restart_daemon"]]
    if told["restart_trainer"]:
        lines.append("the trainer starts anew with: p2pfed task pause && p2pfed task resume")
    emit(args, "config-reload", told, lines or ["nothing has changed"])


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

    options = {key: getattr(args, key) for key in ("data", "seed", "out", "epsilon", "rounds")}
    sys.stdout.flush()
    return run_demo({**options, "json": args.json})
