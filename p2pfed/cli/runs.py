"""run create, sign, show, accept, list: the run file's way from the stewards into a hospital.

`accept` verifies the file against the daemon's own roster, shows what will leave the building, and
asks once. The genesis file is copied beside the daemon's other blobs; nothing but its path is sent.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from p2pfed.cli.files import read_bytes, read_document, replace_file, write_new
from p2pfed.cli.locate import admin_client, data_folder
from p2pfed.cli.options import confirmed, describe, with_json, with_socket
from p2pfed.cli.text import emit, number, size, table
from p2pfed.errors import ConfigError, FactRejected, P2PFedError, PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable
    from typing import Any

    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run

__all__ = ["run"]


def run(parser: ArgumentParser) -> None:
    """Fill in the command group `run`."""
    describe(parser, "Training runs: the stewards create and sign one, each hospital accepts it.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, act: Callable[[Namespace], None]) -> ArgumentParser:
        made = actions.add_parser(name, help=text, description=text)
        made.set_defaults(run=act)
        return made

    create = action("create", "draft a run file and make its first model", _create)
    _create_options(create)
    with_json(create)

    sign = action("sign", "add one steward's signature to a run file, in place", _sign)
    sign.add_argument("file", metavar="FILE")
    sign.add_argument("--key", required=True, metavar="KEYFILE")
    sign.add_argument("--roster", metavar="FILE", help="to say how many signatures are missing")
    with_json(sign)

    show = action("show", "what a run file says, and what would leave the building", _show)
    show.add_argument("file", metavar="FILE")
    show.add_argument("--roster", required=True, metavar="FILE")
    with_json(show)

    accept = action("accept", "take part in a run, after being shown what leaves", _accept)
    accept.epilog = "endpoint: GET /v1/roster, POST /v1/runs"
    accept.add_argument("file", metavar="FILE")
    accept.add_argument("--genesis", metavar="FILE", help="the run's first model, if you have it")
    accept.add_argument("--yes", action="store_true", help="do not ask")
    with_socket(accept)

    listing = action("list", "runs that this node knows", _list)
    listing.epilog = "endpoint: GET /v1/runs"
    with_socket(listing)


def _option(parser: ArgumentParser, name: str, default: Any, text: str, **more: Any) -> None:
    kind = {int: int, float: float}.get(type(default))
    if kind is not None:
        more["type"] = kind
    parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **more)


def _create_options(parser: ArgumentParser) -> None:
    parser.add_argument("--roster", required=True, metavar="FILE", help="fixes the network")
    parser.add_argument("--task", required=True, help="as installed at every hospital")
    parser.add_argument("--name", help="what people call the run; default: the task's name")
    parser.add_argument("--out", required=True, metavar="FILE", help="the run file to write")
    parser.add_argument(
        "--genesis", required=True, metavar="FILE", help="where to write the first model"
    )
    _gate_options(parser)
    _averaging_options(parser)


def _gate_options(parser: ArgumentParser) -> None:
    from p2pfed.identity.rules import SCHEDULES
    from p2pfed.identity.run import MECHANISMS

    option = partial(_option, parser)
    option("mechanism", "svt", "how updates are protected", choices=MECHANISMS)
    option("unit", "patient", "who is protected", choices=("patient", "hospital"))
    option("epsilon", "10", "of the whole run, per unit; the bundled demo's value")
    option("delta", "1e-5", "well below 1 / number of patients (Dwork & Roth 2014, sec. 2.3)")
    option("rounds", 60, "the budget is spread evenly over them; enough for the bundled tasks")
    option("clip", "1", "L2 bound of one contribution; a public constant")
    option("patients-per-row", 1, "patients that make one contribution; above 1 doubles the noise")
    option("grid-bits", 16, "values are multiples of 2^-BITS; rounding far below the noise")
    option("block-size", 1, "coordinates per selection test; 1 below 10,000 parameters, else 16-32")
    option("segment-blocks", 4, "blocks of which at most one is sent: a quarter, or 2 at high ε")
    option("select-share", "0.2", "of the budget, for selecting; .1 to .3 was measured best")
    option("schedule", "auto", "how svt goes through the blocks", choices=SCHEDULES)
    option("block-reach", "2", "sequential: a block's clip, times its even share of the clip")
    option("worth-releases", 0, "release only so many rounds, those that are worth it; 0 is all")
    option("worth-share", "0.1", "of a release's budget, for asking whether it is worth it")
    option("worth-ratio", "1", "worth it: an update so many times as long as its noise")
    parser.add_argument(
        "--top-fraction",
        help="of coordinates sent with mechanisms none and gaussian (default 0.1 with none: Aji &"
        " Heafield 2017; 1 with gaussian)",
    )


def _averaging_options(parser: ArgumentParser) -> None:
    from p2pfed.identity.rules import MODES, OUTERS, ROBUST

    option = partial(_option, parser)

    def switch(name: str, text: str) -> None:
        parser.add_argument(f"--{name}", action="store_true", help=text)

    option("values", "int16", "how finely a value is written", choices=("int16", "int8"))
    switch("error-feedback", "add what was not sent to the next update; only mechanism none")
    option("outer", "fedadam", "outer optimiser (Reddi et al. 2021)", choices=OUTERS)
    option("learning-rate", 0.03, "of the outer optimiser; 1 is the average with fedavg")
    option("beta1", 0.9, "first moment (Reddi et al. 2021)")
    option("beta2", 0.99, "second moment (Reddi et al. 2021)")
    option("adam-epsilon", 1e-6, "added to the root of the second moment")
    switch("no-bias-correction", "the moments as in Reddi et al. 2021, not as in Adam")
    option("mode", "set", "one model for all, or random pairs that average", choices=MODES)
    option("robust", "clip-median", "rule against outliers", choices=ROBUST)
    option("weight-power", "1", "n patients weigh n^p; 0.5 if one hospital has most of them")
    option("sample-cap", "0", "n counts at most this many times the median; 0 is no cap")
    option("committee", 0, "members that release in a round; 0 is all up to 64, 64 beyond")
    switch("participation-scaling", "who is rarely there takes larger steps; small rates only")
    switch("drift-correction", "correct local steps by the public mean (Scaffold); dense, no noise")
    option("hot-rounds", 50, "older deltas than this are folded in rarely")
    option("late-interval-s", 900.0, "seconds between two such folds")
    option("exchanges", 4, "meetings per round that a node starts in mode pairwise")
    option(
        "quorum", 0.8, "share of live weight that ends a round early; waiting longer buys little"
    )
    option("min-live", 0.5, "share of all weight that must be alive to start a round: a majority")
    option("deadline-s", 60.0, "longest wait for a round's updates, seconds")
    option("min-round-interval-s", 0.0, "shortest time between two round starts, seconds")


# --- create ------------------------------------------------------------------------------------


def _create(args: Namespace) -> None:
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import SignedDocument

    roster = Roster.decode(SignedDocument.parse(read_bytes(args.roster)).payload)
    for path in (args.out, args.genesis):
        if Path(path).exists():
            raise ConfigError(f"{path} exists already", "nothing is overwritten", "choose another")
    fields = _fields(args, roster)  # before the task is loaded: a typo is found at once
    described = _describe_task(args.task, args.genesis)
    try:
        payload = Run(
            **fields,
            task_id=bytes.fromhex(described["task_id"]),
            genesis=bytes.fromhex(described["genesis"]),
            num_parameters=described["num_parameters"],
        ).encode()
    except (KeyError, TypeError, ValueError) as error:
        raise P2PFedError("the task's description makes no sense", repr(error)) from error
    made = Run.decode(payload)
    write_new(args.out, SignedDocument(payload).encode())
    data = {"file": args.out, "run_id": made.run_id.hex(), "genesis": args.genesis}
    lines = [
        f"run {made.name} ({made.num_parameters} parameters): {args.out}, not signed yet",
        f"first model: {args.genesis}",
        f"next: {roster.threshold} stewards run: p2pfed run sign {args.out} --key KEYFILE",
    ]
    emit(args, "run", data, lines)


def _fields(args: Namespace, roster: Roster) -> dict[str, Any]:
    from p2pfed.identity.rules import Averaging, Encoding, Gate, Outer

    private = args.mechanism != "none"
    top_fraction = args.top_fraction or ("1" if args.mechanism == "gaussian" else "0.1")
    return {
        "name": args.name or args.task,
        "network_id": roster.network_id,
        "task": args.task,
        "rounds": args.rounds,
        "grid_bits": args.grid_bits,
        "mechanism": args.mechanism,
        "unit": args.unit if private else "none",
        "epsilon": _exact("epsilon", args.epsilon if private else "0"),
        "delta": _exact("delta", args.delta if private else "0"),
        "clip": _exact("clip", args.clip),
        "block_size": args.block_size,
        "segment_blocks": args.segment_blocks,
        "select_share": _exact("select-share", args.select_share),
        "top_fraction": _exact("top-fraction", top_fraction),
        "outer": Outer(
            args.outer,
            args.learning_rate,
            args.beta1,
            args.beta2,
            args.adam_epsilon,
            bias_correction=not args.no_bias_correction,
        ),
        "robust": args.robust,
        "quorum": args.quorum,
        "min_live": args.min_live,
        "deadline_s": args.deadline_s,
        "min_round_interval_s": args.min_round_interval_s,
        "gate": Gate(
            patients_per_row=args.patients_per_row,
            schedule=args.schedule,
            block_reach=_exact("block-reach", args.block_reach),
            worth_releases=args.worth_releases,
            worth_share=_exact("worth-share", args.worth_share),
            worth_ratio=_exact("worth-ratio", args.worth_ratio),
        ),
        "encoding": Encoding(args.values, error_feedback=args.error_feedback),
        "averaging": Averaging(
            mode=args.mode,
            weight_power=_exact("weight-power", args.weight_power),
            sample_cap=_exact("sample-cap", args.sample_cap),
            committee=args.committee,
            participation_scaling=args.participation_scaling,
            drift_correction=args.drift_correction,
            hot_rounds=args.hot_rounds,
            late_interval_s=args.late_interval_s,
            exchanges=args.exchanges,
        ),
    }


def _exact(name: str, text: str) -> Any:
    from fractions import Fraction

    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--{name} {text!r} is not a number", "", "write e.g. 0.25") from error


def _describe_task(task: str, genesis: str) -> dict[str, Any]:
    """Ask the private plane about a task, in a process of its own: it loads torch."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "p2pfed.training", "describe", task, "--genesis", genesis]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        Path(genesis).unlink(missing_ok=True)
        told = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ConfigError(f"cannot describe the task {task!r}", "\n".join(told[-3:]))
    try:
        described = json.loads(done.stdout)
    except ValueError as error:
        raise P2PFedError("the task's description is not JSON", done.stdout[:200]) from error
    if not isinstance(described, dict):
        raise P2PFedError("the task's description is not an object", done.stdout[:200])
    return described


# --- sign, show, list --------------------------------------------------------------------------


def _sign(args: Namespace) -> None:
    from p2pfed.identity.keys import StewardKey
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import RUN, SignedDocument

    document = SignedDocument.parse(read_bytes(args.file))
    made = Run.decode(document.payload)
    signed = document.signed_by(StewardKey.load(Path(args.key)).seed, RUN)
    have = signed.signers(RUN)
    count, lines = len(have), [f"signed run {made.name}: {args.file}"]
    if args.roster:
        roster = Roster.decode(SignedDocument.parse(read_bytes(args.roster)).payload)
        count = len(have & {s.key for s in roster.stewards})
        lack = roster.threshold - count
        lines.append(
            f"{count} of {roster.threshold} signatures; {lack} more needed"
            if lack > 0
            else f"{count} signatures are enough; next: p2pfed run accept {args.file}"
        )
    else:
        lines.append(f"{count} signature{'s' * (count != 1)} now")
    replace_file(args.file, signed.encode())
    emit(args, "run", {"run_id": made.run_id.hex(), "signatures": count}, lines)


def _show(args: Namespace) -> None:
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import RUN, SignedDocument

    roster = Roster.decode(SignedDocument.parse(read_bytes(args.roster)).payload)
    document = SignedDocument.parse(read_bytes(args.file))
    made = Run.decode(document.payload)
    if made.network_id != roster.network_id:
        raise FactRejected(f"run {made.name!r} is not of the network {roster.network}")
    signers = document.signers(RUN)
    names = [s.name for s in roster.stewards if s.key in signers]
    leaving = made.leaving(roster)
    data = {
        "run_id": made.run_id.hex(),
        "name": made.name,
        "task": made.task,
        "task_id": made.task_id.hex(),
        "genesis": made.genesis.hex(),
        "signed_by": names,
        "leaving": leaving,
    }
    lines = [
        f"run {made.name}   task {made.task}   id {made.run_id.hex()[:16]}…",
        f"signed by {', '.join(names) or 'nobody'}   ({roster.threshold} needed)",
        *_leaving(made, leaving),
    ]
    emit(args, "run", data, lines)


def _leaving(made: Run, leaving: dict[str, Any]) -> list[str]:
    if made.mechanism == "none":
        protection = '  protection      NONE: mechanism "none", asked for by name'
        rate = "  privacy         no bound on what the updates reveal about a patient"
    else:
        protection = f"  protection      {made.mechanism}, of each {made.unit}"
        if made.gate.patients_per_row > 1:
            protection += f", {made.gate.patients_per_row} patients to a contribution"
        rate = (
            f"  privacy         at most ε {number(leaving['epsilon'])}, "
            f"δ {number(leaving['delta'])} in all; one round alone: "
            f"about ε {number(leaving['epsilon_of_one_round'])}"
        )
    sent = (
        f"at most {size(leaving['bytes_per_round'])}: "
        f"{leaving['coordinates_per_round']} of {leaving['num_parameters']} values"
    )
    if made.averaging.mode == "pairwise":
        meetings = 2 * made.averaging.exchanges
        sent = (
            f"about {size(leaving['bytes_per_round'])}: this hospital's whole model, "
            f"in about {meetings} meetings with one peer each"
        )
    return [
        "what leaves the building:",
        f"  per round       {sent}",
        f"  rounds          {leaving['rounds']}",
        protection,
        rate,
        f"  receivers       {', '.join(leaving['receivers']) or 'nobody yet'}",
        "  what was received by them cannot be taken back; stop any time: p2pfed share off",
    ]


def _list(args: Namespace) -> None:
    found = admin_client(args).get("/v1/runs")
    keys = ("name", "task", "mechanism", "rounds", "active", "id")
    rows = [tuple(str(item.get(key, "-")) for key in keys) for item in found]
    emit(args, "runs", found, table(tuple(key.upper() for key in keys), rows))


# --- accept ------------------------------------------------------------------------------------


def _accept(args: Namespace) -> None:
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import check_signed_run
    from p2pfed.identity.signing import SignedDocument

    signed = read_document(args.file)
    client = admin_client(args, timeout=60.0)
    held = client.get("/v1/roster")
    roster = Roster.decode(SignedDocument.parse(held["signed"].encode()).payload)
    made = check_signed_run(signed.encode(), roster)
    genesis = None if args.genesis is None else _genesis(args, made)
    if not args.json:
        lines = [*_leaving(made, made.leaving(roster)), *_staying(args, made, roster)]
        emit(args, "run", None, lines)
    if not confirmed(args, f"Take part in run {made.name}?"):
        raise PolicyError("the run was not accepted", "you said no", "nothing was changed")
    stored = None if genesis is None else _store(args, made, genesis)
    answer = client.post("/v1/runs", {"signed": signed, "genesis": stored})
    warning = (answer.get("archive") or {}).get("warning")
    lines = [f"accepted run {made.name}; watch it with: p2pfed status"]
    emit(args, "run", answer, [*([f"warning: {warning}"] if warning else []), *lines])


def _staying(args: Namespace, made: Run, roster: Roster) -> list[str]:
    """How much of this disk the archive takes."""
    from p2pfed.node.archive import Archive, forecast

    folder = data_folder(args)
    if not folder.is_dir():
        return [
            "what stays on this disk:",
            f"  archive         at most {size(forecast(made, roster))}",
        ]
    archive = Archive.of(made, roster, held_bytes=0, folder=folder)
    room = f"at most {size(archive.forecast_bytes)}; {size(archive.free_bytes)} are free"
    warning = [f"  warning: {archive.warning}"] if archive.warning else []
    return ["what stays on this disk:", f"  archive         {room}", *warning]


def _genesis(args: Namespace, made: Run) -> bytes:
    from p2pfed.identity.filehash import file_hash

    data = read_bytes(args.genesis)
    if file_hash(data) != made.genesis:
        raise FactRejected(
            f"{args.genesis} is not the first model of run {made.name}",
            f"its hash is {file_hash(data).hex()[:16]}…, the run names {made.genesis.hex()[:16]}…",
            "get the file that belongs to the run; without --genesis the daemon asks its peers",
        )
    return data


def _store(args: Namespace, made: Run, genesis: bytes) -> str:
    blob = (data_folder(args) / "blobs" / made.genesis.hex()).absolute()
    try:
        blob.parent.mkdir(mode=0o700, exist_ok=True)
        blob.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {blob}", error.strerror or "") from error
    replace_file(blob, genesis)
    return str(blob)
