"""The steps of a dry run that train: loss, gradients, metrics, time, and what a run may protect.

Map: `loss` and `gradient` of the first batches, at the task's first model -> `metrics` on those who
test -> `pace` of ordinary local steps -> `privacy`: one contribution per patient, for a few of
them. The other steps are in `check_steps`.

Invariant: what is found of patients (losses, the length of a contribution) goes to the rows, which
the hospital's own terminal shows, and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfed.training.acceptance import Installed
from p2pfed.training.check import Row, Step
from p2pfed.training.check_steps import (
    Bench,
    buffers,
    data,
    device,
    exchange,
    memory,
    model,
    patients,
    ranges,
    seconds,
    task,
)
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import ready_model, train_local
from p2pfed.training.patients import Batch, Patients
from p2pfed.training.vector import set_vector

__all__ = ["steps_of"]

_SEED = 0
_BATCHES = 20  # whose loss is looked at
_LONG = 5.0  # seconds that a step of the check takes about at most
_FEW = 8  # patients whose contributions are computed
_LOOKED_AT = 4096  # coordinates of two readings that are compared
_ALIKE = 1e-3  # relative; in half precision a tenth is let pass
_MUCH_WAITING = 0.5
_ONE_BY_ONE = "one by one"  # in the note of contributions that cannot be vectorised


def steps_of(bench: Bench) -> tuple[Step, ...]:
    """All steps for a task; the few that there are for a loop's model."""
    first = (
        Step("device", (), device, "set train.device"),
        Step("task", (), task, "correct the module, or train.task"),
        Step("model", ("task",), model, "correct `model`"),
        Step("buffers", ("model",), buffers, "correct `model`"),
    )
    last = (
        Step("exchange", ("model",), exchange, ""),
        Step("memory", ("device",), memory, ""),
    )
    if bench.is_loop:
        return first + last
    ready = ("device", "model", "data")
    return (
        *first,
        Step("data", ("task",), data, "correct `data`, or train.data and train.options"),
        Step("patients", ("data",), patients, "correct `data`"),
        Step("loss", ready, loss, "correct `loss`, `model`, or what `data` gives them"),
        Step("gradient", ("loss",), gradient, "correct `loss`"),
        Step("metrics", ready, metrics, "correct `metrics`"),
        Step("time", ("gradient",), pace, "correct `optimizer` or `hyper`"),
        Step("privacy", ("loss",), privacy, "correct `loss` or `model`"),
        *last,
    )


def loss(bench: Bench) -> Iterator[Row]:
    """One finite number per record, of that record alone; for whatever the model gives."""
    made = ready_model(bench.task, bench.vector, hardware=bench.hardware)
    batches = bench.data.train.batches(bench.task.hyper.batch_size, seed=_SEED)
    began, broken, below, total, number = time.monotonic(), 0, 0, 0, 0
    for number, (x, y) in enumerate(islice(batches, _BATCHES)):
        values = _losses(bench, made, x, y)
        if isinstance(values, Row):
            yield values
            return
        if number == 0:
            yield from _first_batch(bench, made, (x, y), values)
        total += len(values)
        broken += int((~torch.isfinite(values)).sum())
        below += int((values < 0).sum())
        bench.watch.progress("batches", number + 1, _BATCHES)
        if time.monotonic() - began > _LONG:
            break
    labels = f"labels go {ranges(bench.data.train, y)}"
    if broken:
        what = f"NaN or infinite for {broken} of {total} records at the first model; {labels}"
        yield Row("loss", "FAIL", what, "are the records scaled, and the labels in range?")
    elif below:
        what = f"below 0 for {below} of {total} records at the first model; {labels}"
        yield Row("loss", "warn", what, "are the labels in the range that the loss expects?")
    else:
        yield Row("loss", "ok", f"one finite number per record, in {number + 1} batches")


def _losses(bench: Bench, made: nn.Module, x: Tensor, y: Tensor) -> Tensor | Row:
    """The losses of a batch, or what is wrong with their shape."""
    x, y = bench.take(x, y)
    with torch.no_grad(), bench.hardware.computing():
        output = made(x)
        values: Any = bench.task.loss(output, y)
    if not isinstance(values, Tensor):
        return Row("loss", "FAIL", f"loss() gives a {type(values).__name__}", "return a tensor")
    if tuple(values.shape) != (len(x),):
        what = f"loss() gives shape {tuple(values.shape)} for {len(x)} records"
        do = f'return one number per record, shape ({len(x)},): reduction="none", then the mean'
        return Row("loss", "FAIL", what, do + " of a record's own values")
    return values


def _first_batch(bench: Bench, made: nn.Module, batch: Batch, values: Tensor) -> Iterator[Row]:
    """What need not be asked of every batch."""
    x, y = bench.take(*batch)
    with torch.no_grad(), bench.hardware.computing():
        output = made(x)
        before, given = _state(made), y.clone()
        bench.task.loss(output, y)
    if not torch.equal(y, given):
        yield Row("loss", "FAIL", "loss() changes the targets", "compute on a copy")
    if changed := _changed(made, before):
        yield Row("loss", "FAIL", f"loss() changes the model: {changed}", "it must only look")
    alone = _losses(bench, made, batch[0][:1], batch[1][:1])
    if isinstance(alone, Row):
        yield Row("loss", "FAIL", f"a batch of one record: {alone.found}", alone.do)
    elif not torch.allclose(alone[0], values[0], rtol=_tolerance(bench), atol=1e-4):
        what = "a record's loss depends on the records beside it"
        yield Row("loss", "warn", what, "let `loss` and `model` treat every record by itself")
    if isinstance(output, Tensor) and output.is_floating_point():
        yield from _on_nan(bench, output, given)


def _on_nan(bench: Bench, output: Tensor, y: Tensor) -> Iterator[Row]:
    broken = torch.full_like(output, math.nan, device="cpu")  # there an error ends nothing
    try:
        bench.task.loss(broken, y.cpu())
    except Exception as error:  # noqa: BLE001 - a task's code may raise anything
        if bench.hardware.device.type != "cpu" and "device" in str(error):
            return  # it keeps something on the accelerator: this cannot be asked
        yield Row(
            "loss",
            "FAIL",
            f"loss() raises {type(error).__name__} where the model gives NaN",
            "let it give NaN: peers see a round that fails, and nobody pays for what that tells",
        )


def _tolerance(bench: Bench) -> float:
    return _ALIKE if bench.hardware.autocast is None else 100 * _ALIKE


def gradient(bench: Bench) -> Iterator[Row]:
    """Does the loss reach every parameter?"""
    with torch.random.fork_rng(devices=bench.hardware.seeded_devices()):
        torch.manual_seed(_SEED)
        made = bench.task.model()
        set_vector(made, bench.vector, bench.task.private_parameters)
        bench.hardware.place(made).train()
        batches = bench.data.train.batches(bench.task.hyper.batch_size, seed=_SEED)
        x, y = bench.take(*next(batches))
        with bench.hardware.computing():
            mean = bench.task.loss(made(x), y).mean()
        if not mean.requires_grad:
            what = "the loss does not depend on the model's parameters"
            yield Row("gradient", "FAIL", what, "no .detach(), .item(), argmax or no_grad in it")
            return
        mean.backward()
    yield from _gradients(dict(made.named_parameters()))


def _gradients(named: Mapping[str, nn.Parameter]) -> Iterator[Row]:
    slopes = {name: p.grad for name, p in named.items() if p.grad is not None}
    broken = [name for name, slope in slopes.items() if not bool(torch.isfinite(slope).all())]
    reached = [name for name, slope in slopes.items() if bool(slope.any())]
    without = [name for name in named if name not in slopes]
    if broken:
        what = f"NaN or infinite for {broken[0]} and {len(broken) - 1} others"
        yield Row("gradient", "FAIL", what, "no sqrt, log or division at 0 in `loss` and `model`")
    elif not reached:
        yield Row("gradient", "FAIL", "zero everywhere", "does the loss depend on the output?")
    elif without:
        yield Row(
            "gradient",
            "warn",
            f"none for {without[0]} and {len(without) - 1} others: they are sent and never learn",
            "leave them out of the model, or name them in private_parameters",
        )
    else:
        length = math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes.values()))
        yield Row("gradient", "ok", f"reaches all {len(named)} tensors, length {length:.3g}")


def metrics(bench: Bench) -> Iterator[Row]:
    """Are they finite numbers, and is the one among them that says what is better?"""
    task, test = bench.task, bench.data.test.on(bench.hardware.device)
    made = ready_model(task, bench.vector, hardware=bench.hardware)
    before = _state(made)
    with torch.no_grad():
        found: Any = task.metrics(made, test)
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        yield Row("metrics", "FAIL", f"metrics() gives a {kind}", 'return {"accuracy": ...}')
        return
    if changed := _changed(made, before):
        yield Row("metrics", "FAIL", f"metrics() changes the model: {changed}", "only look at it")
    values = {name: float(value) for name, value in found.items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        what = f"{broken[0]} is {values[broken[0]]} at the first model"
        yield Row("metrics", "FAIL", what, "leave out what cannot be told")
    if task.monitor not in values:
        what = f"{task.monitor!r}, the one that is watched, is not among them"
        do = f"set monitor to one of: {', '.join(map(str, values)) or '(there is none)'}"
        yield Row("metrics", "FAIL", what, do)
    told = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    yield Row("metrics", "ok", f"of the first model: {told}", facts={"metrics": sorted(values)})


def pace(bench: Bench) -> Iterator[Row]:
    """Seconds of a local step and of a round, and how much of them is waiting for records."""
    hyper, watch = bench.task.hyper, bench.watch
    said = watch.said
    watch.taken()
    _train(bench, 1)
    first = watch.taken()
    steps = max(1, min(hyper.local_steps, int(_LONG / max(sum(first.values()), 1e-3))))
    _train(bench, steps)
    later = watch.taken()
    each = sum(later.values()) / steps
    waiting = later.get("data", 0.0) / max(sum(later.values()), 1e-9)
    found = (
        f"{seconds(each)} per local step, {seconds(each * hyper.local_steps)} per round of"
        f" {hyper.local_steps}; {waiting:.0%} of it waiting for records"
    )
    warmed = first.get("data", 0.0) - later.get("data", 0.0) / steps
    if warmed > 0.5:  # a cache that is filled, workers that are started
        found += f"; the first step waited {seconds(warmed)} longer"
    facts = {"seconds_per_step": each, "seconds_per_round": each * hyper.local_steps}
    facts |= {"share_waiting": waiting, "first_wait": first.get("data", 0.0)}
    if waiting > _MUCH_WAITING and each * hyper.local_steps > 1:
        do = "keep in memory what `data` reads, once it is decoded and scaled"
        yield Row("time", "warn", found, do, facts)
    else:
        yield Row("time", "ok", found, facts=facts)
    yield from (
        Row("time", "warn", note, "a smaller batch or patch") for note in watch.notes_after(said)
    )


def _train(bench: Bench, steps: int) -> None:
    train_local(
        bench.task,
        bench.data.train,
        bench.vector,
        steps=steps,
        seed=_SEED,
        hardware=bench.hardware,
        watch=bench.watch,
    )


def privacy(bench: Bench) -> Iterator[Row]:
    """May a run protect single patients, and what does it cost in time?"""
    train = bench.data.train
    reason = Installed.of(bench.task, bench.data).not_by_patient
    if reason:
        yield _not_by_patient(bench, reason)
        return
    few = train.subset(range(min(_FEW, train.num_patients)))
    said = bench.watch.said
    first = _read(bench, few)
    began = time.monotonic()
    second = _read(bench, few)
    each = (time.monotonic() - began) / few.num_patients
    notes = bench.watch.notes_after(said)
    one_by_one = any(_ONE_BY_ONE in note for note in notes)
    yield from _rows_of_contributions(bench, first, second)
    if one_by_one:
        how, do = "one patient after the other", "no control flow on values, no .item()"
    else:
        how, do = "vectorised over patients", ""
    round_seconds = each * train.num_patients
    yield Row(
        "privacy",
        "warn" if one_by_one else "ok",
        f"single patients can be protected; {how}, at most {seconds(round_seconds)} per reading"
        " of all, and a round reads twice",
        do and f"faster: {do} in `loss` and `model`",
        {"by_patient": True, "vectorised": not one_by_one, "seconds_per_reading": round_seconds},
    )
    yield from (Row("privacy", "warn", note) for note in notes if _ONE_BY_ONE not in note)


def _not_by_patient(bench: Bench, reason: str) -> Row:
    facts = {"by_patient": False}
    what, do = "no run may protect single patients", "no buffers and no private_parameters"
    if bench.subject.unit != "patient" or bench.subject.allow_none:
        return Row("privacy", "warn", f"{what}: {reason}", f"if one is to: {do}", facts)
    what += ", and this hospital takes part in no other"
    return Row("privacy", "FAIL", f"{what}: {reason}", f"{do}; or another privacy.unit", facts)


def _read(bench: Bench, few: Patients) -> NDArray[np.float64]:
    """Length and first coordinates of each contribution, shape (n, 1 + at most 4096)."""
    rows = PatientContributions(
        bench.task, bench.vector, few, seed=_SEED, hardware=bench.hardware, watch=bench.watch
    )
    read = []
    for _, chunk in rows.labelled_chunks():
        length = np.linalg.norm(chunk.astype(np.float64), axis=1, keepdims=True)
        read.append(np.hstack([length, chunk[:, :_LOOKED_AT]]))
    return np.concatenate(read)


def _rows_of_contributions(
    bench: Bench, first: NDArray[np.float64], second: NDArray[np.float64]
) -> Iterator[Row]:
    lengths = first[:, 0]
    broken = int((~np.isfinite(lengths)).sum())
    empty = int((lengths == 0).sum())
    if broken:
        what = f"NaN or infinite for {broken} of {len(lengths)} patients: they would count as zeros"
        yield Row("contributions", "FAIL", what, "correct `loss`, or scale the records")
        return
    if not np.allclose(first, second, rtol=_tolerance(bench), atol=1e-6):
        yield Row(
            "contributions",
            "FAIL",
            "a patient's contribution is another one at the second reading",
            "draw nothing in `loss`, `model` and `stacked` but from the seed: the gate reads twice",
        )
        return
    found = f"length {np.median(lengths):.3g} (median), {lengths.max():.3g} (most)"
    more = f"; zero for {empty}" if empty else ""
    yield Row(
        "contributions",
        "warn" if empty else "ok",
        f"{found} of {len(lengths)} patients{more}; stays here: a run's clip is not taken from it",
        "does every patient have records that teach something?" if empty else "",
    )


def _state(made: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def _changed(made: nn.Module, before: Mapping[str, Any]) -> str:
    """The first tensor that is not as it was; "" for none."""
    now = made.state_dict()
    return next((n for n, value in before.items() if not torch.equal(value, now[n])), "")
