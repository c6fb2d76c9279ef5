"""An existing training loop joins a run in three lines; its process is then the trainer.

    fed = p2pfed.join(model)              # waits for the daemon's next round in `for`
    for epoch in fed:                     # was: for epoch in range(100)
        ...                               # untouched
        fed.sync(n_samples=len(train), loss=loss)

Map: `join` (configuration, model, patients) -> `loop_rounds.Federation`: its `for` puts the
network's model into the user's, in place, and `sync` hands in what training has made of it. In
between nothing of the user's is touched: device, optimiser, buffers and parameters that stay at
home are as the loop leaves them.

Invariant: gate and ledger run here (`loop_task.LoopHospital`), and what crosses to the daemon is
what the gate released, fixed texts and public numbers, as from a spawned trainer (`answers`).
`n_samples`, loss and metrics are seen on the private socket alone. A loop that ends, however it
ends, loses its round and nothing else.

p2pfed cannot see how the update was computed: the loop makes one contribution for the whole
hospital, so the privacy unit is the hospital and nothing finer.

A guest in somebody's program: nothing is printed, no signal, thread count, umask or limit is
changed (core dumps stay as the user has them), and no thread that is started keeps it alive.

Not here: the rounds (`loop_rounds`), the connection (`loop_link`), what a loop is to the gate
(`loop_task`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from p2pfed.config import Settings, load_settings
from p2pfed.errors import ConfigError
from p2pfed.places import PLACES, usual_configuration
from p2pfed.training.loop_rounds import Federation, Metrics
from p2pfed.training.loop_task import LOOP, LoopPatients, LoopTask

__all__ = ["Federation", "join"]

_JOINED: weakref.WeakValueDictionary[Path, Federation] = weakref.WeakValueDictionary()


def join(
    model: nn.Module,
    *,
    config: str | Path | None = None,
    patients: Iterable[str | bytes] | None = None,
    private_parameters: Iterable[str] = (),
    version: str = "",
    metrics: Metrics | None = None,
    wait: float = 0.0,
) -> Federation:
    """Make this process the trainer of the node whose daemon runs on this machine.

    Args:
        model: The model that the loop trains; it is changed in place, on whatever device it is.
        config: The node's configuration; None for P2PFED_CONFIG, else the first that exists of
            ./p2pfed.toml, ~/.config/p2pfed/p2pfed.toml and /etc/p2pfed/p2pfed.toml.
        patients: A stable id of every patient that the loop trains on, the same in all tasks: the
            ledger knows by them whose budget is spent. Needed for runs with a privacy mechanism.
            They stay in this process and its ledger, which keeps keyed hashes.
        private_parameters: Patterns (as of `fnmatch`) of parameters that stay at home.
        version: What must be equal at all hospitals and is not seen in the model's tensors.
        metrics: Gives figures of merit of a model, for the private socket alone. It is called in
            evaluation mode, without gradients, on the network's model.
        wait: Seconds to wait for a daemon that does not run yet, or not any more.

    Raises:
        ConfigError: No configuration, `train.task` is not "loop", or the model does not fit.
        DaemonNotRunning: There is no daemon, or not within `wait` seconds.
        StateInUse: Another loop has joined, or another process has the ledger.
        PolicyError: The daemon does not let us in; in its words.
        PrivacyError: The ledger cannot be opened.
        TrainerError: The daemon does not take us.
    """
    settings = _loop_settings(_config_path(config))
    named = None if patients is None else LoopPatients.named(patients)
    task = LoopTask(lambda: model, version=version, private=private_parameters)
    earlier = _JOINED.pop(settings.file, None)
    if earlier is not None:  # a notebook's cell that was run again
        earlier.close()
    joined = Federation(settings, task, named, metrics=metrics, wait=wait)
    _JOINED[settings.file] = joined
    return joined


def _config_path(named: str | Path | None) -> Path:
    named = named or os.environ.get("P2PFED_CONFIG")
    if named:
        return Path(named).expanduser()
    found = usual_configuration()
    if found is None:
        raise ConfigError(
            "there is no configuration of a p2pfed node here",
            "looked for " + ", ".join(PLACES),
            "name it: p2pfed.join(model, config=FILE), or set P2PFED_CONFIG",
        )
    return found


def _loop_settings(path: Path) -> Settings:
    settings = load_settings(path)
    if not settings.train.enabled or settings.train.task != LOOP:
        is_off = "train.enabled is false"
        raise ConfigError(
            f"this node's train.task is {settings.train.task!r}"
            if settings.train.enabled
            else f"this node does not train: {is_off}",
            "its daemon takes no training loop" + ", but starts that task" * settings.train.enabled,
            f'set enabled = true and task = "loop" under [train] in {path}, restart the daemon',
        )
    return settings
