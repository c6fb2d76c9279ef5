"""run create: from flags to a run file without signatures, and the run's first model.

Map: `create_options` (one flag per term of a run, its default said) -> `create`: flags become the
fields of `identity.run.Run`, the private plane describes the task and makes the first model.

Invariant: a wrong flag is told before the task is loaded, and nothing is overwritten. Torch is
loaded by another process only.

Not here: what becomes of the file (`runs`), which terms fit together (`identity.run`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from p2pfed.cli.approval import roster_text
from p2pfed.cli.files import read_document, write_new
from p2pfed.cli.options import with_json
from p2pfed.cli.task_options import option_flag, options_of
from p2pfed.cli.text import emit
from p2pfed.errors import ConfigError, P2PFedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import Any

    from p2pfed.identity.roster import Roster

__all__ = ["create", "create_options"]


def create_options(parser: ArgumentParser) -> None:
    """Give `run create` its flags."""
    parser.add_argument("--roster", required=True, metavar="FILE", help="fixes the network")
    parser.add_argument("--task", required=True, help="as installed at every hospital")
    option_flag(
        parser, "as train.options on this machine, e.g. bundle=DIR; not part of the run file"
    )
    parser.add_argument("--name", help="what people call the run; default: the task's name")
    parser.add_argument("--out", required=True, metavar="FILE", help="the run file to write")
    parser.add_argument(
        "--genesis", required=True, metavar="FILE", help="where to write the first model"
    )
    _gate_options(parser)
    _averaging_options(parser)
    with_json(parser)


def _option(parser: ArgumentParser, name: str, default: Any, text: str, **more: Any) -> None:
    kind = {int: int, float: float}.get(type(default))
    if kind is not None:
        more["type"] = kind
    parser.add_argument(f"--{name}", default=default, help=f"{text} (default {default})", **more)


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


def create(args: Namespace) -> None:
    """Write the run file and the first model."""
    from p2pfed.identity.roster import Roster
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import SignedDocument

    signed = read_document(args.roster, roster_text)
    roster = Roster.decode(SignedDocument.parse(signed.encode()).payload)
    for path in (args.out, args.genesis):
        if Path(path).exists():
            raise ConfigError(f"{path} exists already", "nothing is overwritten", "choose another")
    fields = _fields(args, roster)  # before the task is loaded: a typo is found at once
    described = _describe_task(args.task, args.genesis, options_of(args))
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
        f"next: p2pfed run sign {args.out} --key KEYFILE   ({roster.threshold} of"
        f" {len(roster.stewards)} stewards must)",
    ]
    emit(args, "run-create", data, lines)


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
        raise ConfigError(
            f"--{name} {text!r} is not a number",
            "it is a decimal or a fraction, because all hospitals compute with it exactly",
            "write e.g. 0.25",
        ) from error


def _describe_task(task: str, genesis: str, options: dict[str, Any]) -> dict[str, Any]:
    """Ask the private plane about a task, in a process of its own: it loads torch."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "p2pfed.training", "describe", task, "--genesis", genesis]
    if options:
        command += ["--options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        Path(genesis).unlink(missing_ok=True)
        told = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ConfigError(
            f"cannot describe the task {task!r}",
            "; ".join(told[-3:]),
            "correct it, or look closer: p2pfed task check -h",
        )
    try:
        described = json.loads(done.stdout)
    except ValueError as error:
        raise P2PFedError("the task's description is not JSON", done.stdout[:200]) from error
    if not isinstance(described, dict):
        raise P2PFedError("the task's description is not an object", done.stdout[:200])
    return described
