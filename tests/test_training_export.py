"""Models as files: what is read, what is refused, and what an exported folder says and holds."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import trio
from model_files import facts_of, write_common
from node_parts import a_node
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from p2pfed.errors import ConfigError, P2PFedError
from p2pfed.gossip.events import Fold
from p2pfed.tasks.breast_cancer import BreastCancer
from p2pfed.tasks.heart_disease import HeartDisease
from p2pfed.training.card import escaped
from p2pfed.training.export import Wishes, example_of, export, write_onnx
from p2pfed.training.home import NOTHING, Home
from p2pfed.training.local import initial_vector, ready_model
from p2pfed.training.model_file import (
    HeldModel,
    named_tensors,
    newest_tuned,
    read_model,
    tuned_path,
    write_tensors,
)
from p2pfed.training.provenance import Provenance
from p2pfed.training.task import HyperParameters, Split, Task, TaskData

ROOT = Path(__file__).resolve().parent.parent


class Headed(Task):
    """A shared trunk with tied weights and a buffer, and a private head."""

    name = "headed"
    hyper = HyperParameters(local_steps=2)
    private_parameters = ("head.*",)
    outputs = 2

    def model(self):
        model = nn.ModuleDict(
            {"one": nn.Linear(3, 3), "two": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}
        )
        model["two"].weight = model["one"].weight
        model["head"] = nn.Linear(3, self.outputs)
        model.forward = lambda x: model["head"](model["norm"](model["two"](model["one"](x))))
        return model

    def data(self, folder, options):
        split = Split(torch.ones(4, 3), torch.zeros(4), torch.arange(4))
        return TaskData(split, split)

    def loss(self, output, target):
        return (output.sum(1) - target) ** 2

    def metrics(self, model, patients):
        return {"loss": 1.0}


def origin(task: Task, **changed) -> Provenance:
    return Provenance.parse(json.dumps(facts_of(task, **changed)), name="m")


def held_by(task: Task, *, seed: int = 1, home: Home = NOTHING, **changed) -> HeldModel:
    return HeldModel(initial_vector(task, seed=seed), home, origin(task, **changed))


def exported(folder: Path, held: HeldModel, task: Task | None = None, **wishes) -> str:
    """Export a model of the breast cancer task; the card."""
    export(folder, task or BreastCancer(), "breast-cancer", held, Wishes(**wishes))
    return (folder / "README.md").read_text("utf-8")


# --- reading -----------------------------------------------------------------------------------


def test_a_common_model_is_read_bit_for_bit_with_where_it_comes_from(tmp_path):
    task = BreastCancer()
    held = read_model(write_common(tmp_path / "m", task), task)
    assert held.vector.tobytes() == initial_vector(task, seed=1).tobytes()
    assert (held.origin.run, held.origin.round, held.origin.kind) == ("heart-1", 3, "common")
    assert held.origin.deltas == {"Oslo": 3, "Kyoto": 2}


def test_tensors_by_name_come_back_with_private_ones_buffers_and_tied_ones(tmp_path):
    task = Headed()
    own = {"head.bias": torch.tensor([5.0, 6.0]), "norm.running_mean": torch.tensor([1.0, 2, 3])}
    held = held_by(task, home=Home(own), kind="mine")
    write_tensors(tmp_path / "m", named_tensors(task, held, mine=True), held.origin)
    read = read_model(tmp_path / "m", task)
    assert read.vector.tobytes() == held.vector.tobytes()
    assert read.origin == held.origin
    for name, value in own.items():
        assert torch.equal(read.home.model[name], value)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o600


def test_a_model_of_another_task_is_refused_by_its_name(tmp_path):
    path = write_common(tmp_path / "m", HeartDisease())
    with pytest.raises(ConfigError, match="'heart-disease'") as told:
        read_model(path, BreastCancer())
    assert "'breast-cancer'" in told.value.why


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        (np.zeros(30, np.float32), r"shape \[30\]"),
        (np.zeros((31, 1), np.float32), r"shape \[31, 1\]"),
        (np.full(31, np.nan, np.float32), "NaN"),
        (np.full(31, np.inf, np.float32), "NaN or infinity"),
    ],
)
def test_a_model_of_another_size_or_without_values_is_refused(tmp_path, vector, told):
    path = write_common(tmp_path / "m", BreastCancer(), vector)
    with pytest.raises(ConfigError, match=told):
        read_model(path, BreastCancer())


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04\x95", b"PK\x03\x04" + bytes(100), bytes(8), b"\xff" * 64, b"{}"],
    ids=["empty", "pickle", "zip", "zeros", "ones", "text"],
)
def test_what_is_no_safetensors_file_is_refused_and_never_opened_as_anything_else(
    tmp_path, content
):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a model"):
        read_model(tmp_path / "m", BreastCancer())


def test_a_file_that_is_missing_or_a_folder_is_told(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="no model file"):
            read_model(path, BreastCancer())


def test_a_file_without_facts_is_refused(tmp_path):
    save_file({"model": np.zeros(31, np.float32)}, tmp_path / "m")
    with pytest.raises(ConfigError, match="does not say which task"):
        read_model(tmp_path / "m", BreastCancer())


@pytest.mark.parametrize(
    "changed",
    [
        {"round": -1},
        {"round": True},
        {"round": "3"},
        {"epsilon": float("inf")},
        {"epsilon": "5"},
        {"run": "x" * 301},
        {"run": None},
        {"model_hash": "zz" * 32},
        {"run_id": "../" * 21 + "x"},
        {"deltas": {"Oslo": -1}},
        {"deltas": [1]},
        {"v": 2},
        {"kind": "other"},
        {"kind": []},
    ],
    ids=str,
)
def test_facts_that_are_not_what_they_should_be_are_refused(changed):
    with pytest.raises(ConfigError, match="does not say where it comes from"):
        origin(BreastCancer(), **changed)


async def test_the_facts_that_a_node_gives_are_understood(tmp_path):
    async with a_node(tmp_path, config="allow_none = true") as node:
        await node.with_run()
        facts, run = node.core.facts, node.shell.run
        delta = node.consortium.delta(run, 0, 1)
        node.store.keep_delta(delta, durable=False)
        facts.add(delta.signed)
        plan = Fold(1, (facts.chain(0), facts.chain(1)), (facts.counted(0),))
        await trio.to_thread.run_sync(node.shell.model.fold, plan)
        with await node.operator.model() as file:
            (tmp_path / "m").write_bytes(file.read())
    with safe_open(tmp_path / "m", framework="pt") as file:
        told = Provenance.parse(file.metadata()["p2pfed"], name="m")
        assert file.get_slice("model").get_shape() == [run.num_parameters]
    assert (told.kind, told.round, told.deltas) == ("common", 1, {"h1": 1})
    assert (told.run_id, told.mechanism) == (run.run_id.hex(), "none")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "{}"], ids=lambda t: t[:4])
def test_facts_that_are_no_object_are_refused(text):
    with pytest.raises(ConfigError, match="does not say where"):
        Provenance.parse(text, name="m")


def test_named_tensors_that_do_not_fit_are_refused_by_name(tmp_path):
    task = Headed()
    held = held_by(task, kind="mine")
    tensors = named_tensors(task, held, mine=True)
    for change, told in (
        ({"head.bias": torch.zeros(9)}, r"head.bias of shape \[9\]"),
        ({"tail.bias": torch.zeros(2)}, "does not fit"),
    ):
        write_tensors(tmp_path / "m", {**tensors, **change}, held.origin)
        with pytest.raises(ConfigError, match=told):
            read_model(tmp_path / "m", task)
    write_tensors(tmp_path / "m", {"head.bias": tensors["head.bias"]}, held.origin)
    with pytest.raises(ConfigError, match="does not fit") as told_of:
        read_model(tmp_path / "m", task)
    assert "norm.bias" in told_of.value.why


def test_the_model_that_was_tuned_last_is_found(tmp_path):
    with pytest.raises(ConfigError, match="no tuned model"):
        newest_tuned(tmp_path / "none")
    for second, run in enumerate(("bb" * 32, "aa" * 32)):
        path = tuned_path(tmp_path, run)
        path.write_bytes(b"")
        os.utime(path, (second, second))
    assert newest_tuned(tmp_path) == tuned_path(tmp_path, "aa" * 32)


# --- the exported folder -----------------------------------------------------------------------


def test_an_exported_model_loads_as_a_state_dict_and_is_the_model(tmp_path):
    task, held = BreastCancer(), held_by(BreastCancer())
    exported(tmp_path / "out", held)
    model = task.model()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), ready_model(task, held.vector)(x))
    again = read_model(tmp_path / "out" / "model.safetensors", task)
    assert again.origin.kind == "exported"


@pytest.mark.slow
def test_the_lines_of_the_card_load_the_model(tmp_path):
    held = held_by(BreastCancer())
    text = exported(tmp_path / "out", held)
    [lines] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(lines.splitlines()) == 5
    done = subprocess.run(
        [sys.executable, "-c", lines + "print(float(model[0].bias))"],
        cwd=tmp_path / "out",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == pytest.approx(float(held.vector[-1]))


def test_what_stays_at_home_is_left_out_and_not_even_its_size_is_told(tmp_path):
    task = Headed()
    task.outputs = 417
    text = exported(tmp_path / "out", held_by(task), task)
    names = set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    assert names == {"one.weight", "one.bias", "two.weight", "two.bias", "norm.weight", "norm.bias"}
    assert "417" not in text
    assert escaped("head.*") in text
    assert escaped("head.weight") not in text  # heads may be named after what nobody should know
    assert "strict=False" in text


def test_with_what_stays_at_home_the_folder_is_private_and_says_so(tmp_path):
    task = Headed()
    own = Home({"head.bias": torch.tensor([5.0, 6.0])})
    text = exported(tmp_path / "out", held_by(task, home=own), task, mine=True)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["head.bias"], own.model["head.bias"])
    assert "**MUST NOT BE GIVEN AWAY.**" in text
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o600}
    assert read_model(tmp_path / "out" / "model.safetensors", task).origin.kind == "mine"


@pytest.mark.parametrize("kind", ["mine", "tuned"])
def test_a_model_that_must_not_be_given_away_is_exported_only_by_name(tmp_path, kind):
    held = held_by(BreastCancer(), kind=kind, tuning="5 steps")
    with pytest.raises(ConfigError, match="function of this hospital's patients"):
        exported(tmp_path / "out", held)
    assert "MUST NOT BE GIVEN AWAY" in exported(tmp_path / "out", held, mine=True)
    kept = read_model(tmp_path / "out" / "model.safetensors", BreastCancer())
    assert kept.origin.kind == kind


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    held = held_by(BreastCancer())
    exported(tmp_path / "out", held)
    with pytest.raises(ConfigError, match="exists already"):
        exported(tmp_path / "out", held)
    monkeypatch.setattr("p2pfed.training.export.card", lambda *_, **__: "\ud800")  # not UTF-8
    with pytest.raises(UnicodeEncodeError):
        exported(tmp_path / "other", held)
    with pytest.raises(ConfigError, match="cannot write"):
        exported(tmp_path / "none" / "out", held)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("p2pfed.training.model_file.write_privately", full)
    with pytest.raises(ConfigError, match="cannot write") as told:
        exported(tmp_path / "out", held_by(BreastCancer()))
    assert told.value.why == "No space left on device"
    assert list(tmp_path.iterdir()) == []


# --- the card ----------------------------------------------------------------------------------


def test_the_card_states_the_facts(tmp_path):
    text = " ".join(exported(tmp_path / "out", held_by(BreastCancer())).split())
    for said in (
        "31 parameters",
        "version 7",
        "3 of 60",
        "3f" * 32,
        "0c" * 32,
        "| Oslo | 3 |",
        "ε = 5** at δ = 1e-05",
        "ε = 1.25",
        "whether one patient of a hospital",
        "What it does not promise",
        "not a medical device",
        "## License",
    ):
        assert said in text
    assert "GIVEN AWAY" not in text
    assert "Measured" not in text


def test_without_a_mechanism_the_card_says_so_in_capitals(tmp_path):
    held = held_by(BreastCancer(), mechanism="none", unit="none", relation="none")
    text = exported(tmp_path / "out", held)
    assert "**MECHANISM NONE: NOTHING PROTECTS THE PATIENTS OF THIS MODEL.**" in text
    assert "What this promises" not in text


def test_the_unit_of_the_promise_is_the_runs(tmp_path):
    held = held_by(BreastCancer(), unit="hospital", relation="replacement")
    assert "which patients one hospital had" in exported(tmp_path / "out", held).replace("\n", " ")


def test_metrics_are_in_the_card_only_where_they_are_asked_for(tmp_path):
    held = held_by(BreastCancer())
    assert "0\\.9" not in exported(tmp_path / "a", held)
    text = exported(tmp_path / "b", held, metrics={"auc|x": 0.912})
    assert "| auc\\|x | 0.912 |" in text


def test_counts_that_are_not_known_are_not_made_up(tmp_path):
    held = held_by(BreastCancer(), deltas=None)
    assert "was not known" in exported(tmp_path / "a", held)
    held = held_by(BreastCancer(), deltas_known_from=2)
    assert "from round 2 on" in exported(tmp_path / "b", held)


def test_no_name_can_format_link_or_hide_anything(tmp_path):
    evil = "](http://x) <img src=x> `a` | **b**\n# c \x1b[2J \u202e &lt;"
    names = dict.fromkeys(("run", "task", "network", "node"), evil)
    facts = facts_of(BreastCancer()) | names | {"deltas": {evil: 1}}
    told = Provenance.parse(json.dumps(facts), name="m")
    held = HeldModel(initial_vector(BreastCancer(), seed=1), NOTHING, told)
    text = exported(tmp_path / "out", held)
    lines = [line for line in text.splitlines() if "img" in line]
    assert len(lines) >= 4
    for line in lines:
        plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", line)
        assert not re.search(r"[<`&\[\]\x1b\u202e]|http://", plain), line
    assert "\n# c" not in text


# --- ONNX --------------------------------------------------------------------------------------


def patients() -> Split:
    return BreastCancer().data(None, {"site": 0, "sites": 5}).test


def test_no_record_of_a_patient_goes_into_the_exporter():
    example = example_of(patients())
    assert example.shape == (1, 30)
    assert not example.any()


@pytest.mark.slow
def test_onnx_gives_what_the_model_gives_for_any_number_of_records(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    held = held_by(BreastCancer())
    text = exported(tmp_path / "out", held, onnx=example_of(patients()))
    assert "`model.onnx` is the same model" in text
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    told = ReferenceEvaluator(str(tmp_path / "out" / "model.onnx"))
    model = ready_model(BreastCancer(), held.vector)
    for count in (1, 2, 7):
        x = torch.randn(count, 30, generator=torch.Generator().manual_seed(count))
        [output] = told.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(output, model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_onnx_of_half_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="part of this one stays"):
        exported(tmp_path / "out", held_by(Headed()), Headed(), onnx=torch.zeros(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="not installed") as told:
        write_onnx(nn.Linear(2, 1), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert "p2pfed[onnx]" in told.value.do


@pytest.mark.slow
def test_a_model_that_onnx_cannot_say_is_told_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")

    class Odd(nn.Module):
        def forward(self, x):
            return x * float(x.sum().item()) if bool(x.sum() > 0) else x

    with pytest.raises(P2PFedError, match="cannot be written as ONNX") as told:
        write_onnx(Odd().eval(), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert len(str(told.value).splitlines()) == 3
