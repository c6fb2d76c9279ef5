"""model fetch, export, evaluate, tune, pictures: the common model, at this hospital.

`fetch` asks the daemon. The others take the common model from it, or a file, and hand it to the
private plane (`private_plane`): the patients, and what is computed on them, are there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from p2pfed.cli.locate import admin_client, private_data
from p2pfed.cli.options import describe, with_socket
from p2pfed.cli.private_plane import ask, place
from p2pfed.cli.text import emit, number, short_id, table
from p2pfed.errors import ConfigError, DaemonNotRunning, VersionMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator
    from typing import Any

__all__ = ["common_model", "model"]

_LONGEST_PICTURES = 600.0  # seconds: the trainer goes over its test patients first
_MOST_HEADER = 1 << 24


def model(parser: ArgumentParser) -> None:
    """Fill in the command group `model`."""
    describe(parser, "The common model: fetch it, export it, judge it, tune it, look at it.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, act: Callable[[Namespace], None]) -> ArgumentParser:
        first = text.partition("\n")[0].rstrip(".")
        made = actions.add_parser(name, help=first[0].lower() + first[1:])
        describe(made, text, endpoint="GET /v1/model")
        with_socket(made)
        made.set_defaults(run=act)
        return made

    fetch = action("fetch", _FETCH, _fetch)
    fetch.add_argument("-o", "--out", required=True, metavar="FILE", help="not overwritten")

    export = action("export", _EXPORT, _export)
    export.add_argument("--out", required=True, metavar="DIR", help="made; must not exist")
    _choice(export, tuned=False)
    export.add_argument("--task", help="without a configuration: as installed here")
    export.add_argument("--onnx", action="store_true", help="also as ONNX (extra: p2pfed[onnx])")
    export.add_argument(
        "--mine",
        action="store_true",
        help="with what stays at this hospital; the folder must not be given away",
    )
    export.add_argument(
        "--with-metrics", action="store_true", help="tell this hospital's metrics in the card"
    )

    evaluate = action("evaluate", _EVALUATE, _evaluate)
    _choice(evaluate)
    evaluate.add_argument(
        "--against-alone",
        action="store_true",
        help="also train on this hospital's patients alone, for as many steps",
    )

    tune = action("tune", _TUNE, _tune)
    _choice(tune, tuned=False)
    tune.add_argument("--steps", type=_positive, help="the most to try (default: five rounds')")
    tune.add_argument("--seed", type=int, default=0, help="who is held out (default 0)")

    pictures = action("pictures", _PICTURES, _pictures)
    pictures.epilog = "endpoint: GET /v1/pictures of the private socket, or GET /v1/model"
    pictures.add_argument("--out", required=True, metavar="DIR", help="made 0700; must not exist")
    _choice(pictures)


_FETCH = """Write the common model as it is now to a file.
One safetensors file: the flat vector, and in its metadata where it comes from."""
_EXPORT = """Write the model as a folder for others: tensors by name, and a model card.
The card says where the model comes from and what protects whom. What stays at this hospital is
left out, unless --mine asks for it."""
_EVALUATE = """Measure the model on this hospital's own test patients, before it is adopted.
Beside it: the tuned model, if there is one, and the first, untrained one. Nothing leaves."""
_TUNE = """Fine-tune the common model on this hospital's patients, and keep it here.
How far is chosen on a held-out fifth of the training patients; not at all, if nothing helps. The
tuned model is never shared: nothing protects the patients whom it was made of."""
_PICTURES = """Draw the best, the median and the worst test case, in three planes, as PNG.
They are images of this hospital's patients: keep the folder here."""


def _choice(parser: ArgumentParser, *, tuned: bool = True) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--from", dest="file", metavar="FILE", help="a model file; default: as the daemon has it"
    )
    if tuned:
        which.add_argument("--tuned", action="store_true", help="the model tuned here last")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# --- fetch -------------------------------------------------------------------------------------


def _fetch(args: Namespace) -> None:
    target = Path(args.out)
    if target.exists():
        raise ConfigError(f"{target} exists already", "nothing is overwritten", "name a new file")
    admin_client(args, timeout=60.0).download("/v1/model", target)
    facts = _facts(target)
    emit(
        args,
        "model",
        {"file": str(target), **facts},
        [
            f"run {facts['run']} after {facts['round']} of {facts['rounds']} rounds: {target}",
            f"{facts['num_parameters']} parameters, hash {short_id(str(facts['model_hash']))}",
        ],
    )


def _facts(path: Path) -> dict[str, Any]:
    """What the daemon has written into a model file."""
    import json

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MOST_HEADER)))
        facts = json.loads(header["__metadata__"]["p2pfed"])
        for key in ("run", "round", "rounds", "num_parameters", "model_hash"):
            facts[key]  # is it there?
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VersionMismatch(
            f"{path} is not the model file that was expected", f"{type(error).__name__}: {error}"
        ) from error
    return dict(facts)


@contextlib.contextmanager
def common_model(args: Namespace, file: str | None) -> Iterator[str]:
    """A model file: the one that is named, or the daemon's model for as long as the block lasts."""
    import tempfile

    if file is not None:
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="p2pfed-") as folder:  # 0700
        path = Path(folder) / "common.safetensors"
        try:
            admin_client(args, timeout=60.0).download("/v1/model", path)
        except DaemonNotRunning as error:
            raise DaemonNotRunning(
                error.what, error.why, f"{error.do}, or name a file of p2pfed model fetch"
            ) from error
        yield str(path)


@contextlib.contextmanager
def _chosen(args: Namespace) -> Iterator[list[str]]:
    """The flags that say which model, for the private plane."""
    where = place(args)  # before the daemon is asked for much
    if getattr(args, "tuned", False):
        yield [*where, "--model", "tuned"]
        return
    with common_model(args, args.file) as path:
        yield [*where, "--model", path]


# --- export, evaluate, tune --------------------------------------------------------------------


def _export(args: Namespace) -> None:
    flags = ["--out", args.out]
    flags += [f"--{name}" for name in ("onnx", "mine") if getattr(args, name)]
    flags += ["--with-metrics"] * args.with_metrics
    _check_new(args.out)
    with _chosen(args) as chosen:
        data = ask("export", [*chosen, *flags])
    lines = [f"{data['model']}: {data['folder']}", f"files: {', '.join(data['files'])}"]
    if data["mine"]:
        lines.append("this folder must not be given away: it is made of this hospital's patients")
    elif data["left_out"]:
        lines.append(f"{len(data['left_out'])} tensors stay at this hospital and were left out")
    emit(args, "model-export", data, lines)


def _evaluate(args: Namespace) -> None:
    flags = ["--against-alone"] * args.against_alone
    with _chosen(args) as chosen:
        data = ask("evaluate", [*chosen, *flags])
    emit(args, "model-evaluate", data, [f"{data['model']}   ({_HERE})", *_measures(data)])


_HERE = "on this hospital's own test patients; stays here"


def _measures(data: dict[str, Any]) -> list[str]:
    """The models' metrics as a table, the one that decides first."""
    monitor = data["monitor"]
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["metrics"]))
    names.sort(key=lambda name: name != monitor)
    sign = "↑" if data["larger_is_better"] else "↓"
    head = ["model", *(f"{name} {sign}" if name == monitor else name for name in names)]
    return table(
        head,
        (
            [row["model"], *(number(row["metrics"].get(name)) for name in names)]
            for row in data["rows"]
        ),
    )


def _tune(args: Namespace) -> None:
    flags = ["--seed", str(args.seed)]
    if args.steps is not None:
        flags += ["--steps", str(args.steps)]
    with _chosen(args) as chosen:
        data = ask("tune", [*chosen, *flags])
    how = data["chosen"]
    done = f"{how['steps']} steps at learning rate {number(how['rate'])}"
    lines = [
        f"{data['model']}   ({_HERE})",
        *_measures(data),
        f"tuned by {done}: {data['file']}"
        if how["steps"]
        else f"no tuning did better than the common model, which is kept: {data['file']}",
        "it is made of this hospital's patients, without protection: never give it away",
    ]
    emit(args, "model-tune", data, lines)


# --- pictures ----------------------------------------------------------------------------------


def _pictures(args: Namespace) -> None:
    from p2pfed.report.three_planes import draw_pictures

    _check_new(args.out)
    data = _shown(args)
    written = draw_pictures(data["pictures"], Path(args.out), score=data["monitor"] or "score")
    cases = [
        {"rank": rank, "case": shown["case"], "score": shown["score"]}
        for rank, shown in data["pictures"].items()
    ]
    files = [str(path) for path in written]
    lines = [
        *table(
            ["", "case", data["monitor"] or "score"],
            ([case["rank"], str(case["case"]), number(case["score"])] for case in cases),
        ),
        f"{len(files)} pictures: {args.out}   ({data['model']})",
        "they are images of this hospital's patients: keep them here",
    ]
    emit(args, "model-pictures", {"files": files, "cases": cases, "model": data["model"]}, lines)


def _shown(args: Namespace) -> dict[str, Any]:
    """Pictures of the newest model from a running trainer, else from a process of their own."""
    if args.file is None and not args.tuned:
        with contextlib.suppress(DaemonNotRunning):  # a configuration may still say all
            shown = private_data(args, "pictures", timeout=_LONGEST_PICTURES)
            if isinstance(shown, dict) and shown.get("pictures"):
                newest = f"common model before round {shown.get('round')}, from the trainer"
                return {"pictures": shown["pictures"], "monitor": "", "model": newest}
    with _chosen(args) as chosen:
        return dict(ask("pictures", chosen))


def _check_new(out: str) -> None:
    if Path(out).exists():
        raise ConfigError(f"{out} exists already", "nothing is overwritten", "name a new folder")
