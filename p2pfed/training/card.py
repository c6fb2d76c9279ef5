"""The model card that goes with an exported model: what it is, where from, what protects whom.

After Mitchell et al. 2019, "Model Cards for Model Reporting" (doi:10.1145/3287560.3287596). What it
states are the facts of `provenance`, the tensors of the exported model, and, if the hospital asks
for it by a flag, its own metrics. There is no free text of anybody's.

Invariant: what comes from outside (names of hospitals, networks, runs, tasks) is escaped, so that a
name can neither format nor link nor hide anything.

Not here: the files (`export`, `model_file`).
"""

from __future__ import annotations

import string
import textwrap
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from p2pfed.training.provenance import Provenance

__all__ = ["Contents", "card", "escaped", "layers"]

_PUNCTUATION = frozenset(string.punctuation)  # CommonMark lets each be escaped by a backslash
_MOST_LAYERS = 40


@dataclass(frozen=True, slots=True)
class Contents:
    """What the exported folder holds.

    Attributes:
        spec: How the task is named on the exporting machine.
        model: Class of the model.
        layers: Name, class and number of parameters of its parts, as far as they are in the file.
        num_parameters: In the file.
        left_out: Names of tensors that stay at the hospital and are not in the file.
        loading: Python that loads the model; none where its task cannot be made without options.
        onnx: What is said of `model.onnx`; "" where there is none.
        metrics: The exporting hospital's own; None where it does not tell them.
    """

    spec: str
    model: str
    layers: Sequence[tuple[str, str, int]]
    num_parameters: int
    left_out: Sequence[str]
    loading: Sequence[str]
    onnx: str = ""
    metrics: Mapping[str, float] | None = None


def card(origin: Provenance, contents: Contents, *, mine: bool) -> str:
    """The card as Markdown.

    Args:
        origin: Where the model comes from.
        contents: What is in the folder.
        mine: Whether it holds what must stay at the hospital.
    """
    parts = [
        _HEAD,
        _title(origin, mine=mine),
        _architecture(contents),
        _loading(contents),
        _provenance(origin),
        _privacy(origin, mine=mine),
        _metrics(contents),
        _USE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def layers(model: nn.Module, names: Container[str]) -> list[tuple[str, str, int]]:
    """Name, class and number of parameters of the modules that have some of their own.

    Args:
        model: Of which.
        names: The parameters that count: the size of what stays at home is not told.
    """
    rows = []
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = module.named_parameters(recurse=False)
        count = sum(p.numel() for name, p in own if prefix + name in names)
        if count:
            rows.append((module_name or "(the model itself)", type(module).__name__, count))
    return rows


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in _PUNCTUATION else c for c in shown)


_HEAD = """---
license: other
library_name: pytorch
tags:
- federated-learning
- p2pfed
---"""

_USE = """## Intended use and limits

* It was made by hospitals for research. It is not a medical device, and nobody has shown that it is
  safe or right for the care of a patient.
* It learned on the patients of the hospitals above, with their machines, habits and mistakes of
  labelling. Elsewhere it may do worse: measure it on your own patients first
  (`p2pfed model evaluate`).
* For groups of patients that are rare there it may do much worse, with nobody noticing.

## License

Not stated. The hospitals that made the model decide who may use it, and for what; ask them, and
write it down here."""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _title(origin: Provenance, *, mine: bool) -> str:
    lines = [f"# {escaped(origin.run)}"]
    if mine:
        what = (
            "fine-tuned on this hospital's own patients"
            if origin.kind == "tuned"
            else "with the private parameters and buffers of one hospital"
        )
        lines += [
            "",
            f"> **MUST NOT BE GIVEN AWAY.** This is a model {what}. Nothing protects the patients",
            "> whom it was made of: what it holds beyond the common model stays in the hospital.",
        ]
    text = (
        f"A model for the task {escaped(origin.task)}, trained by the hospitals of the network"
        f" {escaped(origin.network)} together as peers, without a server, by p2pfed."
    )
    return "\n".join([*lines, "", _wrapped(text)])


def _architecture(contents: Contents) -> str:
    rows = [
        f"| {escaped(name)} | {escaped(kind)} | {count:,} |"
        for name, kind, count in contents.layers[:_MOST_LAYERS]
    ]
    if len(contents.layers) > _MOST_LAYERS:
        rest = sum(count for *_, count in contents.layers[_MOST_LAYERS:])
        rows.append(f"| {len(contents.layers) - _MOST_LAYERS} more | | {rest:,} |")
    return "\n".join(
        [
            "## The model",
            "",
            f"{escaped(contents.model)}, {contents.num_parameters:,} parameters.",
            "",
            "| part | class | parameters |",
            "|---|---|---|",
            *rows,
        ]
    )


def _loading(contents: Contents) -> str:
    lines = [
        "## Loading it",
        "",
        f"`model.safetensors` holds the tensors of the state dict. With the task"
        f" {escaped(contents.spec)} installed:",
        "",
        "```python",
        *contents.loading,
        "```",
    ]
    if contents.left_out:
        shown = ", ".join(map(escaped, contents.left_out[:20]))
        more = len(contents.left_out) - 20
        rest = f" and {more} more" if more > 0 else ""
        text = (
            f"Not in the file, because it stays at each hospital: {shown}{rest}. These tensors"
            " start fresh: train them on your own patients before you use the model."
        )
        lines += ["", _wrapped(text)]
    if contents.onnx:
        lines += ["", contents.onnx]
    return "\n".join(lines)


def _provenance(origin: Provenance) -> str:
    facts = [
        ("network", f"{escaped(origin.network)}, id {origin.network_id}"),
        ("roster", f"version {origin.roster_version}, hash {origin.roster_hash or 'not known'}"),
        ("run", f"{escaped(origin.run)}, id {origin.run_id}"),
        ("task", f"{escaped(origin.task)}, id {origin.task_id}"),
        ("rounds", f"{origin.round} of {origin.rounds}, averaging {escaped(origin.averaging)}"),
        ("hash of the common model", origin.model_hash),
        ("hash of the updates it is made of", origin.chain),
        (
            "taken from",
            f"{escaped(origin.node)} \\({escaped(origin.peer_id)}\\),"
            f" p2pfed {escaped(origin.p2pfed)}",
        ),
    ]
    if origin.kind == "tuned":
        facts.append(("tuned", escaped(origin.tuning)))
    lines = [
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        *_deltas(origin),
        "",
        _wrapped(
            "Each hospital that holds the same updates holds the same model, bit for bit. This file"
            " is not signed: to check it, compare both hashes with what `p2pfed model fetch` of"
            " another member says for this round."
        ),
    ]
    return "\n".join(lines)


def _deltas(origin: Provenance) -> list[str]:
    if origin.deltas is None:
        return ["How many updates of which hospital are in it was not known when it was taken."]
    since = (
        f" from round {origin.deltas_known_from} on (earlier ones are in it, but were not counted)"
        if origin.deltas_known_from
        else ""
    )
    return [
        f"Signed updates in the model{since}:",
        "",
        "| hospital | updates |",
        "|---|---|",
        *(f"| {escaped(name)} | {count} |" for name, count in sorted(origin.deltas.items())),
    ]


def _privacy(origin: Provenance, *, mine: bool) -> str:
    parts = [*(_UNPROTECTED if origin.mechanism == "none" else _protected(origin))]
    if mine:
        parts.append(
            "All this is about the common model. What this folder holds beyond it is a function of"
            " one hospital's patients, and no mechanism was applied to it."
        )
    return "\n\n".join(["## Privacy", *map(_wrapped, parts)])


_UNPROTECTED = (
    "**MECHANISM NONE: NOTHING PROTECTS THE PATIENTS OF THIS MODEL.**",
    "Updates left the hospitals as training made them. The model may hold single patients by heart:"
    " from models that were trained like this, patients' records have been reconstructed, and it"
    " was found out who took part. Give it to nobody who may not see the patients' data.",
)


def _protected(origin: Provenance) -> Sequence[str]:
    told = {
        ("patient", "zero-out"): "whether one patient of a hospital took part",
        ("patient", "replacement"): "which records one patient of a hospital had",
        ("hospital", "replacement"): "which patients one hospital had",
    }.get((origin.unit, origin.relation), f"what one {escaped(origin.unit)} gave")
    return (
        f"Mechanism {escaped(origin.mechanism)}, unit {escaped(origin.unit)}: for each hospital on"
        f" its own, the whole run spends at most **ε = {origin.epsilon:g}** at δ ="
        f" {origin.delta:g}. When this model was taken, {escaped(origin.node)} had spent ε ="
        f" {origin.spent_epsilon:.4g} in {origin.releases} releases.",
        "*What this promises.* Who sees the model, and every update that was released in this run,"
        f" can tell no better than ε and δ allow {told}, whatever else they know.",
        "*What it does not promise.* That nothing is learned of a patient from what patients like"
        " them have in common: that is what a model is for. At each hospital where a patient's"
        " records took part, ε counts again. Other runs on the same patients add to it; each"
        " hospital's ledger keeps the sum. It says nothing of what hospitals do with a model at"
        " home, and nothing of whether the model is right.",
    )


def _metrics(contents: Contents) -> str:
    if contents.metrics is None:
        return ""
    rows = [f"| {escaped(name)} | {value:.4g} |" for name, value in contents.metrics.items()]
    return "\n".join(
        [
            "## Measured at the exporting hospital",
            "",
            "On its own test patients, who did not train. Nobody protected these figures: the",
            "hospital chose to tell them.",
            "",
            "| metric | value |",
            "|---|---|",
            *rows,
        ]
    )
