"""Model files as a daemon gives them, and the facts that they carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from p2pfed.training.local import initial_vector
from p2pfed.training.task import Task, task_id


def facts_of(task: Task, **changed: Any) -> dict[str, Any]:
    """The facts of a model of this task; see node/provenance.py."""
    return {
        "v": 1,
        "p2pfed": "0.1.0",
        "run": "heart-1",
        "run_id": "01" * 32,
        "task": task.name,
        "task_id": task_id(task).hex(),
        "num_parameters": int(initial_vector(task, seed=0).size),
        "round": 3,
        "rounds": 60,
        "chain": "0c" * 32,
        "model_hash": "3f" * 32,
        "averaging": "set",
        "deltas": {"Oslo": 3, "Kyoto": 2},
        "deltas_known_from": 0,
        "mechanism": "svt",
        "unit": "patient",
        "relation": "zero-out",
        "epsilon": 5.0,
        "delta": 1e-5,
        "spent_epsilon": 1.25,
        "releases": 3,
        "network": "cardio-eu",
        "network_id": "cd" * 32,
        "roster_version": 7,
        "roster_hash": "ef" * 32,
        "node": "Oslo",
        "peer_id": "12D3KooWOslo",
    } | changed


def write_common(path: Path, task: Task, vector: np.ndarray | None = None, **changed: Any) -> Path:
    """A file as `GET /v1/model` gives it; by default the task's model of seed 1."""
    values = initial_vector(task, seed=1) if vector is None else vector
    metadata = {"p2pfed": json.dumps(facts_of(task, **changed))}
    save_file({"model": np.asarray(values, np.float32)}, path, metadata=metadata)
    return path


def write_config(folder: Path, task: str, options: str = "", data: str = "") -> Path:
    """A node's configuration for a task; returns its path."""
    path = folder / "p2pfed.toml"
    path.write_text(
        f'[node]\nname = "Oslo"\ndata_dir = "."\n[train]\ntask = "{task}"\ndevice = "cpu"\n{data}\n'
        f"[train.options]\n{options}\n[privacy]\nepsilon = 8\n"
    )
    return path
