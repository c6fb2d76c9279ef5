"""Before a run: what each mechanism would release, how noisy it is, and what to expect of it.

Map: `Terms` (what is asked, checked) -> `compare` -> a `Comparison` of `Option`s, in sentences too.

Invariant: everything is computed from public numbers with the plans that a run really uses, the
same shares of the budget and the same grid (`shares`); nothing is drawn and no patient looked at.

How noise is told. M contributions (patients, groups, or 1 hospital) of length at most C are summed
and divided by M. If all had length C, agreed and were spread evenly, a coordinate of the average
were C / sqrt(D): the *even share*. `noise` is the standard deviation on one released coordinate of
the average, `choice` that of one selection test against an even block's norm C sqrt(k / D), both
as multiples of the even share. It is the best case: real updates are shorter and disagree. A row
that sends fewer numbers has less noise on each, but sends less: compare rows of one share.

What to expect rests on measurements (5 hospitals, the largest of 574 patients, epsilon 3 to 100;
digits with 650 parameters, a convolution with 1370, digits and 960 features of noise with 10,250)
and on one formula: the textbook form's noise on an average is sqrt(2) l3 / M, below half of its
clip B only for c <= M e3 / (2 sqrt(2) moves): c <= M epsilon / 5.7 with half of epsilon on values.

Not here: the plans of a real run (`training.plans`), the bytes of a message (`identity.run`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from p2pfed.errors import ConfigError
from p2pfed.privacy.accountant import (
    Budget,
    Cost,
    Route,
    epsilon_spent,
    forecast,
    how_spent,
)
from p2pfed.privacy.mechanism import Mechanism
from p2pfed.privacy.mechanisms import MechanismName, make_plan
from p2pfed.privacy.shares import Share, clip_of_one, contributions, grid_bits
from p2pfed.privacy.svt import Schedule, SvtPlan
from p2pfed.privacy.textbook import TextbookPlan
from p2pfed.privacy.units import PATIENT, Unit

__all__ = ["Comparison", "Option", "Terms", "compare"]

_PLAIN_SHARE = Fraction(1, 10)  # what runs with mechanism "none" send where nobody says else
_MOST = "0, or at most the number of rounds"

# Measured: ratio of the largest hospital's dense noise to the even share, and what it cost.
_FREE, _SOME, _DROWNED = 0.1, 0.4, 1.0
_GOOD = 0.3

# Measured: where choosing blocks was better than a public random mask of the same size.
_DENSE_SHARE, _SPARSE_SHARE = 0.245, 0.105  # 25 and 10 %, blocks being whole
_HIGH_DIMENSION = 10_000
_TELLS_APART = 0.5  # .25 paid, .7 did not


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a run would say, and for how many patients.

    Attributes:
        epsilon: Of the whole run, per unit.
        rounds: How many are planned.
        patients: Of one hospital.
        num_parameters: Length D of an update.
        delta: Of the whole run.
        clip: L2 bound C of one contribution.
        unit: Whom it protects.
        block_size: Coordinates per selection test.
        segment_blocks: At most one block in so many is released.
        select_share: Share of the budget that pays for choosing.
        schedule: "auto" takes the cheaper one.
        block_reach: Sequential: a block's clip, times its even share.
        top_fraction: Sent after dense noise; None for as much as `svt` sends.
        worth_releases: 0, or how many of the rounds are released.
        worth_share: Share of a release's budget that pays for asking whether it is worth it.

    Raises:
        ConfigError: A number is out of range, or they do not fit together.
    """

    epsilon: float
    rounds: int
    patients: int
    num_parameters: int
    delta: float = 1e-5
    clip: Fraction = Fraction(1)
    unit: Unit = PATIENT
    block_size: int = 1
    segment_blocks: int = 4
    select_share: Fraction = Fraction(1, 5)
    schedule: Schedule = "auto"
    block_reach: Fraction = Fraction(2)
    top_fraction: Fraction | None = None
    worth_releases: int = 0
    worth_share: Fraction = Fraction(1, 10)

    def __post_init__(self) -> None:
        group, (low, high) = self.unit.patients_per_row, (Fraction(1, 10**6), Fraction(10**6))
        for fine, name, value, told in (
            (0 < self.epsilon <= high, "epsilon", self.epsilon, "above 0 and at most 1e6"),
            (0 < self.delta < 1, "delta", self.delta, "between 0 and 1, neither of them"),
            (1 <= self.rounds <= high, "rounds", self.rounds, "1 to 1,000,000"),
            (1 <= self.patients < 1 << 24, "patients", self.patients, "1 to 16,777,215"),
            (group <= self.patients, "patients", self.patients, f"at least one group, {group}"),
            (low <= self.clip <= high, "clip", self.clip, "1e-6 to 1e6"),
            (0 < self.select_share < 1, "select-share", self.select_share, "between 0 and 1"),
            (0 < self.worth_share < 1, "worth share", self.worth_share, "between 0 and 1"),
            (0 <= self.worth_releases <= self.rounds, "releases", self.worth_releases, _MOST),
        ):
            if not fine:
                raise _refused(f"{name} {float(value):g}", f"it must be {told}")
        if not self.share_of("gaussian").is_enough:
            raise _refused(
                f"epsilon {self.epsilon:g} and {self.releases:,} releases",
                "each would get less than 1e-8 of zCDP: plan fewer, or a larger epsilon",
            )

    @property
    def releases(self) -> int:
        """Over how many releases the budget is spread."""
        return self.worth_releases or self.rounds

    @property
    def contributions(self) -> int:
        """M: how many rows are summed."""
        return contributions(self.unit, self.patients)

    @property
    def split(self) -> tuple[int, int]:
        """What one release may cost, in nano-rho, and asking before it, in 1e-9 pure epsilon."""
        share = self.share_of("gaussian")
        return share.cost.rho_nano, share.worth_nano

    def share_of(self, mechanism: str) -> Share:
        """What one release under a mechanism may cost; no worth gate precedes the textbook form."""
        gated = self.worth_releases and mechanism != "svt-textbook"
        return Share.of_budget(
            mechanism,
            epsilon=self.epsilon,
            delta=self.delta,
            releases=self.releases if gated else self.rounds,
            asking=self.worth_share if gated else Fraction(0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to release.

    Attributes:
        label: For people.
        mechanism: As runs name it; "random-mask" for the control.
        chosen: Whether a run with these terms that names `mechanism` releases so.
        released: Coordinates per round, at most.
        share: `released` of all.
        noise: On a coordinate of the average, as a multiple of the even share.
        choice: The same for one selection test; 0 without.
        epsilon_once: What one release costs at the run's delta.
        epsilon: What all releases cost together, as the ledger tells it.
        route: Which theorem gave it; empty where nothing is paid.
        releases: How many releases the budget allows; None where nothing is paid.
        why: What is to be said for or against it.
    """

    label: str
    mechanism: str
    chosen: bool = True
    released: int
    share: float
    noise: float
    choice: float = 0.0
    epsilon_once: float
    epsilon: float
    route: Route | None
    releases: int | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All options under the same terms, and what is expected of a run.

    Attributes:
        options: In the order to show them in.
        best: The label of the one expected to learn best.
        usable: Whether the noise leaves anything to learn from.
        reasons: Whole sentences.
    """

    options: tuple[Option, ...]
    best: str
    usable: bool
    reasons: tuple[str, ...]


def compare(terms: Terms) -> Comparison:
    """Compare the mechanisms under the same budget; see the module docstring.

    Raises:
        ConfigError: The numbers make no plan.
    """
    try:
        return _compare(terms)
    except ValueError as error:
        raise _refused("these numbers", str(error)) from error


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(f"no plan for {what}", why, "see: p2pfed privacy plan -h")


def _compare(terms: Terms) -> Comparison:
    plans = {name: _svt(terms, name) for name in ("segmented", "sequential")}
    auto = "sequential" if _svt(terms, terms.schedule).is_sequential else "segmented"
    svt = {
        name: _option(terms, plan, f"svt {name}", chosen=name == auto)
        for name, plan in plans.items()
    }
    used, dense = svt[auto], _option(terms, _plan(terms, "gaussian"), "gaussian", why=_DENSE)
    kept = terms.top_fraction or Fraction(used.released, terms.num_parameters)
    top = math.ceil(kept * terms.num_parameters)
    options = (
        *(replace(one, why=_why_svt(terms, one, used)) for one in svt.values()),
        _textbook(terms),
        dense,
        replace(dense, label="gaussian, top k", released=top, share=float(kept), why=_TOP),
        replace(
            used,
            label="random mask",
            mechanism="random-mask",
            chosen=False,
            noise=dense.noise * math.sqrt(used.share),
            choice=0.0,
            why=_MASK,
        ),
        _option(terms, _plan(terms, "none", fraction=_PLAIN_SHARE), "none", why=_NONE),
    )
    return _expect(terms, options, used, dense.noise)


def _plan(terms: Terms, mechanism: MechanismName, **more: Any) -> Mechanism:
    """The plan of one round, on the grid that training would take."""
    size = terms.num_parameters
    clip = clip_of_one(mechanism, terms.clip, block_reach=terms.block_reach, num_parameters=size)
    return make_plan(
        mechanism,
        num_parameters=size,
        clip=clip,
        bits=grid_bits(clip, terms.contributions),
        budget=terms.share_of(mechanism).amount,
        shuffle_seed=b"",
        unit=terms.unit,
        **more,
    )


def _svt(terms: Terms, schedule: str) -> SvtPlan:
    names = ("block_size", "segment_blocks", "select_share", "block_reach")
    more = {name: getattr(terms, name) for name in names}
    plan = _plan(terms, "svt", schedule=schedule, **more)
    assert isinstance(plan, SvtPlan)
    return plan


def _option(terms: Terms, plan: Mechanism, label: str, **more: Any) -> Option:
    outlook, box, count = plan.outlook(), 1.0, terms.releases
    if isinstance(plan, TextbookPlan):  # its clip is that of one number; no worth gate before it
        box, count = float(plan.clip / terms.clip), terms.rounds
    block = plan.block_size if isinstance(plan, SvtPlan) else 1
    even = math.sqrt(terms.num_parameters) / terms.contributions * box
    return Option(
        label=label,
        mechanism=plan.name,
        released=outlook.released,
        share=outlook.released / terms.num_parameters,
        noise=outlook.value_noise * even,
        choice=outlook.query_noise * even / math.sqrt(block),
        **_told(terms, plan, count),
        **more,
    )


def _told(terms: Terms, plan: Mechanism, count: int) -> dict[str, Any]:
    """What one and all releases cost, worth gates included, and how many the budget allows."""
    if plan.cost == Cost.nothing():
        return {"epsilon_once": 0.0, "epsilon": 0.0, "route": None, "releases": None}
    share = replace(terms.share_of(plan.name), cost=plan.cost)
    costs = {share.cost: count, **({share.asking: count} if share.worth_nano else {})}
    epsilon, route = how_spent(costs, terms.delta)
    return {
        "epsilon_once": epsilon_spent(dict.fromkeys(costs, 1), terms.delta),
        "epsilon": epsilon,
        "route": route,
        "releases": forecast(Budget(terms.epsilon, terms.delta), {}, share.together, fixed=True),
    }


def _textbook(terms: Terms) -> Option:
    numbers = -(-terms.num_parameters // terms.segment_blocks)
    plan = _plan(terms, "svt-textbook", cutoff=numbers, select_share=terms.select_share)
    average = plan.outlook().value_noise / terms.contributions  # in its own clip, at the cut-off
    most = math.floor(numbers / (2 * average))
    why = (
        f"its noise grows with every number that it releases: at most {most:,} a round keep it"
        f" below half of their clip, and it would release {numbers:,}"
    )
    return _option(terms, plan, "svt-textbook", why=("drowns: " if most < numbers else "") + why)


# --- what to expect ----------------------------------------------------------------------------

_DENSE = "the accuracy reference: every coordinate is sent, and nothing is paid for choosing"
_TOP = "the largest of the noisy values: free after the noise, and as little traffic as svt"
_MASK = "a control, which no run can name: svt if it chose blindly and paid for values only"
_NONE = "UNPROTECTED, nothing is promised to anybody; a run has to name it, a hospital to allow it"


def _why_svt(terms: Terms, svt: Option, used: Option) -> str:
    if svt is not used:
        more = svt.choice / used.choice
        return f"the same release, chosen with {more:.2g} times the noise of {used.label}"
    sent = f"sends {svt.share:.2g} of {terms.num_parameters:,}"
    if svt.share > _DENSE_SHARE:
        return (
            f"{sent}: at 25 to 50 % its choice earns nothing, a public random mask of the same size"
            " learns as well"
        )
    if svt.share > _SPARSE_SHARE or terms.num_parameters < _HIGH_DIMENSION:
        return (
            f"{sent}: its choice earns nothing at 25 %, and 0 to 2 points at 10 %, over a public"
            " random mask of the same size"
        )
    if svt.choice > _TELLS_APART:
        return (
            f"{sent}: so few of so many could pay, but a test's noise is {svt.choice:.2g} of what"
            " an even block holds and hides which blocks matter; a larger --block-size lowers it"
        )
    return (
        f"{sent}: where few blocks matter its choice earned 11 to 15 points over a public random"
        " mask (6 % of 10,250, ε 10 to 100)"
    )


def _expect(terms: Terms, options: tuple[Option, ...], used: Option, noise: float) -> Comparison:
    sparse = used.share <= _SPARSE_SHARE and terms.num_parameters >= _HIGH_DIMENSION
    pays = sparse and used.choice <= _TELLS_APART
    best = used.label if pays and noise <= _DROWNED else "gaussian"
    on_best = _SVT_IS_BEST if best == used.label else _DENSE_IS_BEST
    reasons = (on_best, _on_noise(noise), _on_patients(terms, noise), _on_rounds(terms, noise))
    return Comparison(options, best, noise <= _DROWNED, reasons)


_SVT_IS_BEST = (
    "With so few blocks of so many parameters svt was better than dense noise and than a random"
    " mask; gaussian, top k was level with it from ε 30 on and 8 points behind at ε 10."
)
_DENSE_IS_BEST = (
    "At such a share and size dense noise was as accurate as svt or better. For less traffic send"
    " its largest values only (top_fraction), or take svt: 0 to 3 points less at 20 to 40 %."
)


def _on_noise(noise: float) -> str:
    told = f"Dense noise is {noise:.2g} of the even share"
    if noise <= _FREE:
        return f"{told}: where it was measured such noise cost about 1 point or none."
    if noise <= _SOME:
        return f"{told}: where it was measured such noise cost 1 to 4 points."
    if noise <= _DROWNED:
        return f"{told}: where it was measured such noise cost 15 points and more."
    return f"{told}: it drowns the update; expect little better than chance from every mechanism."


def _on_patients(terms: Terms, noise: float) -> str:
    others = "Noise of other hospitals is their own: H of this size together have 1/√H of it."
    if terms.unit.kind == "hospital":
        return f"The unit hospital is one contribution: no number of patients lowers this. {others}"
    if noise <= _GOOD:
        return others
    needed = math.ceil(terms.patients * noise / _GOOD)
    return (
        f"{terms.patients:,} patients are few: noise falls as 1/N, so that about {needed:,} would"
        f" bring it to {_GOOD}. {others}"
    )


def _on_rounds(terms: Terms, noise: float) -> str:
    """Noise grows as the root of the number of releases, among which rho is divided."""
    good = math.floor(terms.releases * (_GOOD / noise) ** 2)
    if good > terms.releases:
        return f"Up to {good:,} releases would keep dense noise within {_GOOD}."
    if good:
        return f"Spread over {good:,} releases the same budget would bring dense noise to {_GOOD}."
    return f"Even a single release of the whole budget would have dense noise above {_GOOD}."
