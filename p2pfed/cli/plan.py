"""privacy plan: before a run, what each mechanism would release, its noise, and what to expect.

No daemon, no patient, nothing drawn: numbers in, a comparison out. The flags are those of
`run create`, with the same defaults, or a run file says it.
"""

from __future__ import annotations

from typing import cast

from p2pfed.cli.files import read_bytes
from p2pfed.cli.options import describe, with_json
from p2pfed.cli.privacy import paragraph
from p2pfed.cli.text import emit, number, size, table
from p2pfed.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator, Sequence
    from typing import Any

    from p2pfed.identity.run import Run
    from p2pfed.privacy.planning import Comparison, Option, Terms
    from p2pfed.privacy.svt import Schedule

__all__ = ["plan"]

_FLAGS: dict[str, tuple[str | None, str]] = {  # as `run create` has them: name -> (default, help)
    "epsilon": (None, "of the whole run, per unit"),
    "rounds": (None, "the budget is spread evenly over them"),
    "delta": ("1e-5", "well below 1 / number of patients"),
    "parameters": ("10000", "of the model"),
    "clip": ("1", "L2 bound of one contribution"),
    "unit": ("patient", "who is protected: patient or hospital"),
    "patients-per-row": ("1", "patients that make one contribution"),
    "block-size": ("1", "coordinates per selection test"),
    "segment-blocks": ("4", "blocks of which at most one is sent"),
    "select-share": ("0.2", "of the budget, for selecting"),
    "schedule": ("auto", "how svt goes through the blocks: auto, segmented or sequential"),
    "block-reach": ("2", "sequential: a block's clip, times its even share"),
    "worth-releases": ("0", "release only so many rounds, those that are worth it; 0 is all"),
}
_SVT = ("block-size", "segment-blocks", "select-share")
_TEXTS = {"unit": ("patient", "hospital"), "schedule": ("auto", "segmented", "sequential")}
_EXACT = {"epsilon", "delta", "clip", "select-share", "block-reach"}


def plan(parser: ArgumentParser) -> None:
    """Fill in the command `privacy plan`."""
    describe(
        parser,
        "Before a run: what each mechanism would release of one hospital, its noise, its cost,\n"
        "and which is expected to be better, with the reason. Asks no daemon, sees no patient.",
    )
    parser.add_argument("--patients", required=True, metavar="N", help="of one hospital")
    for name, (default, text) in _FLAGS.items():
        more = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", metavar=_meta(name), help=text + more)
    parser.add_argument("--run", dest="file", metavar="FILE", help="a run file, instead of these")
    with_json(parser)
    parser.set_defaults(run=_plan)


def _meta(name: str) -> str:
    return {"epsilon": "E", "rounds": "T", "parameters": "D", "clip": "C"}.get(name, "X")


def _plan(args: Namespace) -> None:
    from p2pfed.privacy.planning import compare

    run = _run_of(args)
    terms = _terms(run, _number("patients", args.patients))
    found = compare(terms)
    sent = [_message_bytes(run, option) for option in found.options]
    data = {
        "terms": _shown(terms),
        "options": [
            {**_option(option), "bytes_per_round": count}
            for option, count in zip(found.options, sent, strict=True)
        ],
        "expected": {"best": found.best, "usable": found.usable, "reasons": list(found.reasons)},
    }
    emit(args, "privacy-plan", data, _plan_lines(terms, found, sent))


def _fields(thing: Any) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in thing.__dataclass_fields__}


def _option(option: Option) -> dict[str, Any]:
    """An option as JSON; an ε without a bound is null."""
    shown = _fields(option)
    if option.route is None:
        shown |= {"epsilon": None, "epsilon_once": None}
    return shown


def _shown(terms: Terms) -> dict[str, Any]:
    from fractions import Fraction

    shown = {
        name: float(value) if isinstance(value, Fraction) else value
        for name, value in _fields(terms).items()
    }
    unit = {
        "unit": terms.unit.kind,
        "patients_per_row": terms.unit.patients_per_row,
        "neighbours": terms.unit.neighbours,
    }
    counts = {"contributions": terms.contributions, "releases": terms.releases}
    return {**shown, **unit, **counts}


def _run_of(args: Namespace) -> Run:
    """The run that is asked about: the file's, or one made of the flags."""
    from p2pfed.identity.rules import Gate, Outer
    from p2pfed.identity.run import Run
    from p2pfed.identity.signing import SignedDocument

    given: dict[str, str | None] = {name: getattr(args, name.replace("-", "_")) for name in _FLAGS}
    flags = [f"--{name}" for name, text in given.items() if text is not None]
    if args.file:
        if flags:
            raise ConfigError(f"--run and {flags[0]}", "the run file says it", "give one of them")
        return Run.decode(SignedDocument.parse(read_bytes(args.file)).payload)
    for name in ("epsilon", "rounds"):
        if given[name] is None:
            raise ConfigError(f"no --{name}", "nothing to plan", "give it, or --run FILE")
    value = {name: _value(name, text or _FLAGS[name][0] or "") for name, text in given.items()}
    gate = Gate(
        patients_per_row=value["patients-per-row"],
        schedule=value["schedule"],
        block_reach=value["block-reach"],
        worth_releases=value["worth-releases"],
    )
    return Run(  # what has no influence on the plan is as in any run
        name="",
        network_id=b"",
        task="",
        task_id=b"",
        genesis=b"",
        num_parameters=value["parameters"],
        grid_bits=16,
        mechanism="svt",
        top_fraction=value["clip"] * 0,
        outer=Outer("fedavg", 1.0, 0.9, 0.99, 1e-6),
        robust="none",
        quorum=0.8,
        min_live=0.5,
        deadline_s=60.0,
        min_round_interval_s=0.0,
        gate=gate,
        **{name: value[name] for name in ("rounds", "unit", "epsilon", "delta", "clip")},
        **{name.replace("-", "_"): value[name] for name in _SVT},
    )


def _value(name: str, text: str) -> Any:
    if name not in _TEXTS:
        return _number(name, text, exact=name in _EXACT)
    if text not in _TEXTS[name]:
        raise ConfigError(
            f"--{name} {text!r}",
            "it is none of the words that stand for something here",
            f"it is one of: {', '.join(_TEXTS[name])}",
        )
    return text


def _number(name: str, text: str, *, exact: bool = False) -> Any:
    from fractions import Fraction
    from math import isfinite

    wrong = ConfigError(
        f"--{name} {text!r} is not a {'' if exact else 'whole '}number",
        "it is computed with exactly, so a number must be finite and have at most 40 characters",
        "write e.g. 10",
    )
    try:
        near = float(text)  # a Fraction of 1e999999999 would take hours
        if len(text) > 40 or not isfinite(near) or (near == 0 and text.strip("+-0.")):
            raise wrong
        return Fraction(text) if exact else int(text)
    except ValueError as error:
        raise wrong from error


def _terms(run: Run, patients: int) -> Terms:
    from p2pfed.privacy.planning import Terms
    from p2pfed.privacy.units import Unit

    if run.mechanism == "none":
        raise ConfigError(
            f"run {run.name!r} has mechanism 'none'",
            "it has no budget that could be planned",
            "give --epsilon and --rounds instead of --run",
        )
    try:
        unit = Unit("hospital" if run.unit == "hospital" else "patient", run.gate.patients_per_row)
    except ValueError as error:
        raise ConfigError(
            "no plan for these units", str(error), "groups are of patients"
        ) from error
    return Terms(
        epsilon=float(run.epsilon),
        delta=float(run.delta),
        rounds=run.rounds,
        patients=patients,
        num_parameters=run.num_parameters,
        clip=run.clip,
        unit=unit,
        block_size=run.block_size,
        segment_blocks=run.segment_blocks,
        select_share=run.select_share,
        schedule=cast("Schedule", run.gate.schedule),
        block_reach=run.gate.block_reach,
        top_fraction=run.top_fraction if run.mechanism == "gaussian" else None,
        worth_releases=run.gate.worth_releases,
        worth_share=run.gate.worth_share,
    )


def _message_bytes(run: Run, option: Option) -> int:
    """The most bytes of one update, as a run with this option would have them."""
    from dataclasses import replace
    from fractions import Fraction

    if option.mechanism == "random-mask":  # who knows the mask needs no indices
        whole: dict[str, Any] = {"num_parameters": option.released, "top_fraction": Fraction(1)}
        return replace(run, mechanism="gaussian", **whole).message_bytes
    sent = Fraction(option.released, run.num_parameters)
    return replace(run, mechanism=option.mechanism, top_fraction=sent).message_bytes


# --- printing ----------------------------------------------------------------------------------

_HEAD = (
    "MECHANISM",
    "SENT",
    "SHARE",
    "A ROUND",
    "NOISE",
    "CHOICE",
    "ε OF ONE",
    "ε OF ALL",
    "ROUTE",
    "FIT",
)
_LEGEND = (
    "NOISE: standard deviation of the noise on one number of the hospital's average, as a multiple"
    " of the even share C/√D, which a number has if all updates are as long as the clip, agree and"
    " are spread evenly; 1 drowns it. It falls with SHARE, for the values are clipped again to what"
    " is sent: compare rows of one SHARE. CHOICE: the same for one test of a block. ε OF ALL: what"
    " the ledger would tell after the run, by the theorem ROUTE. FIT: how many such releases the"
    " budget carries."
)


def _plan_lines(terms: Terms, found: Comparison, sent: Sequence[int]) -> Iterator[str]:
    from p2pfed.identity.run import MAX_DELTA_BYTES

    yield from _asked(terms)
    yield ""
    pairs = list(zip(found.options, sent, strict=True))
    yield from table(_HEAD, [_row(option, count, found.best) for option, count in pairs])
    yield ""
    yield from paragraph(_LEGEND)
    yield ""
    width = max(len(option.label) for option in found.options)
    for option in found.options:
        yield from paragraph(option.why, first=f"{option.label:<{width}}  ")
    yield ""
    yield f"expected to learn best: {found.best}{'' if found.usable else ', and badly'}"
    for reason in found.reasons:
        yield from paragraph(reason, first="- ")
    large = [option.label for option, count in pairs if count > MAX_DELTA_BYTES]
    if large:
        limit = size(MAX_DELTA_BYTES)
        yield from paragraph(f"# warning: too large for one message ({limit}): {', '.join(large)}")


def _asked(terms: Terms) -> Iterator[str]:
    rounds = f"{terms.rounds:,} rounds"
    if terms.worth_releases:
        asking = number(terms.split[1] / 1e9)
        rounds += f", of which {terms.releases:,} are released; asking which costs ε {asking} each"
    rows = "one contribution each"
    if terms.contributions != terms.patients:
        rows = f"{terms.contributions:,} contribution{'s' * (terms.contributions > 1)}"
    svt = f"blocks of {terms.block_size:,}, at most one of {terms.segment_blocks:,} is sent"
    named = (
        ("budget", f"ε {terms.epsilon:g}, δ {number(terms.delta)}, over {rounds}"),
        ("hospital", f"{terms.patients:,} patients, {rows}, of length at most C = {_clip(terms)}"),
        ("model", f"D = {terms.num_parameters:,} parameters; svt: {svt}"),
        ("unit", f"{terms.unit.kind}; neighbours by {terms.unit.neighbours}"),
    )
    for name, text in named:
        yield from paragraph(text, first=f"{name:<10}")


def _clip(terms: Terms) -> str:
    return f"{float(terms.clip):g}"


def _row(option: Option, count: int, best: str) -> tuple[str, ...]:
    free = option.route is None
    return (
        option.label + (" *" if option.label == best else ""),
        f"{option.released:,}",
        f"{100 * option.share:.3g} %",
        size(count),
        _times(option.noise),
        _times(option.choice) if option.choice else "-",
        "-" if free else number(option.epsilon_once),
        "∞" if free else number(option.epsilon),
        option.route or "-",
        "-" if option.releases is None else f"{option.releases:,}",
    )


def _times(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
