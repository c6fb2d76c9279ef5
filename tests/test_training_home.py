"""What stays at the hospital from round to round, and what a crash or another task makes of it."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch
from torch import nn

from p2pfed.errors import ConfigError, UpdateRejected
from p2pfed.training.home import NOTHING, Home, HomeFolder, put, taken
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import HyperParameters, Split, Task, task_id
from p2pfed.training.vector import get_vector, num_parameters, shared_parameters

RUN, TASK = b"r" * 32, b"t" * 32


class Headed(Task):
    """A shared trunk with a batch norm, and a head of the hospital's own."""

    name = "headed"
    hyper = HyperParameters(local_steps=4, batch_size=4, optimizer="momentum")
    private_parameters = ("head.*",)
    targets = 2

    def model(self):
        return _Net(self.targets)

    def data(self, folder, options):
        raise NotImplementedError

    def loss(self, output, target):
        return (output - target).square().mean(dim=1)

    def metrics(self, model, patients):
        return {"loss": float(self.loss(model(patients.x), patients.y).mean())}


class _Net(nn.Module):
    def __init__(self, targets):
        super().__init__()
        self.trunk, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, targets)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.trunk(x))))


class Wide(Headed):
    targets = 5


class Kept(Headed):
    hyper = HyperParameters(
        local_steps=4, batch_size=4, optimizer="momentum", optimizer_state="kept"
    )


def patients(count=12, targets=2):
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=chance)
    return Split(x, torch.randn(count, targets, generator=chance), torch.arange(count))


def trained(task, home=NOTHING, steps=4):
    start = initial_vector(task, seed=1)
    return train_local(
        task, patients(targets=task.targets), start,
        steps=steps, learning_rate=0.1, batch_size=4, seed=1, home=home,
    )  # fmt: skip


def test_what_a_task_keeps_at_home_is_not_in_the_vector():
    model = Headed().model()
    assert [name for name, _ in shared_parameters(model, ("head.*",))] == [
        "trunk.weight", "trunk.bias", "norm.weight", "norm.bias",
    ]  # fmt: skip
    assert get_vector(model, ("head.*",)).size == num_parameters(model, ("head.*",)) == 24


def test_hospitals_with_heads_of_different_width_train_one_task():
    assert initial_vector(Headed(), seed=1).size == initial_vector(Wide(), seed=1).size
    assert task_id(Headed()) == task_id(Wide())


def test_a_pattern_that_fits_no_parameter_is_refused_because_it_would_be_shared():
    with pytest.raises(ConfigError, match="fits no parameter"):
        shared_parameters(Headed().model(), ("heads.*",))
    with pytest.raises(ConfigError, match="shares no parameter"):
        shared_parameters(Headed().model(), ("*",))


def test_the_head_and_the_statistics_of_batch_norm_go_on_where_they_were():
    home = trained(Headed()).home
    assert set(home.model) == {
        "head.weight", "head.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    assert int(home.model["norm.num_batches_tracked"]) == 4
    later = trained(Headed(), home).home
    assert int(later.model["norm.num_batches_tracked"]) == 8
    model = Headed().model()
    put(home, model, ("head.*",))
    assert torch.equal(model.head.weight, home.model["head.weight"])


def test_momentum_is_kept_only_where_the_task_says_so():
    assert trained(Headed()).home.optimizer == {}
    home = trained(Kept()).home
    assert {name.partition("/")[2] for name in home.optimizer} == {"momentum_buffer"}
    fresh, kept = trained(Kept()), trained(Kept(), Home({}, home.optimizer))
    assert not np.array_equal(fresh.vector, kept.vector)


def test_four_kept_steps_twice_are_eight_steps():
    """With the same batches and everything kept, a round more is as if training had gone on."""
    task = Kept()
    whole = train_local(
        task, patients(4), initial_vector(task, seed=1),
        steps=8, learning_rate=0.1, batch_size=4, seed=1,
    )  # fmt: skip
    half = train_local(
        task, patients(4), initial_vector(task, seed=1),
        steps=4, learning_rate=0.1, batch_size=4, seed=1,
    )  # fmt: skip
    rest = train_local(
        task, patients(4), half.vector,
        steps=4, learning_rate=0.1, batch_size=4, seed=1, home=half.home,
    )  # fmt: skip
    np.testing.assert_allclose(rest.vector, whole.vector, atol=1e-6)


def test_evaluation_uses_the_hospitals_own_head():
    task, result = Headed(), trained(Headed(), steps=200)
    with_home = evaluate(task, result.vector, patients(), home=result.home)["loss"]
    torch.manual_seed(0)
    assert with_home < evaluate(task, result.vector, patients())["loss"]


def test_what_is_kept_survives_the_process_and_is_nobody_elses_to_read(tmp_path):
    home = trained(Kept()).home
    HomeFolder(tmp_path / "state", TASK).keep(RUN, home)
    [file] = (tmp_path / "state").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    again = HomeFolder(tmp_path / "state", TASK).of(RUN)
    assert again.model.keys() == home.model.keys()
    assert all(torch.equal(again.optimizer[key], value) for key, value in home.optimizer.items())
    assert HomeFolder(tmp_path / "state", TASK).of(b"q" * 32).model == {}


def test_what_another_task_kept_is_refused(tmp_path):
    HomeFolder(tmp_path, TASK).keep(RUN, trained(Headed()).home)
    with pytest.raises(ConfigError, match="another task"):
        HomeFolder(tmp_path, b"u" * 32).of(RUN)


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"garbage of some length"])
def test_a_damaged_file_is_told_and_kept(tmp_path, damage):
    HomeFolder(tmp_path, TASK).keep(RUN, trained(Headed()).home)
    [file] = tmp_path.iterdir()
    file.write_bytes(damage)
    with pytest.raises(ConfigError, match="cannot be read"):
        HomeFolder(tmp_path, TASK).of(RUN)
    assert file.read_bytes() == damage


def test_a_head_of_another_width_is_refused():
    with pytest.raises(ConfigError, match=r"head.weight of shape \(5, 4\)"):
        put(trained(Wide()).home, Headed().model(), ("head.*",))


def test_infinity_at_home_is_no_training_result_and_is_not_kept():
    """Kept, it would spoil every later round."""
    start = initial_vector(Headed(), seed=1)
    home = Home({"norm.running_var": torch.full((4,), float("inf"))})
    with pytest.raises(UpdateRejected, match="NaN or infinity"):
        train_local(
            Headed(), patients(), start,
            steps=1, learning_rate=0.1, batch_size=4, seed=1, home=home,
        )  # fmt: skip


def test_the_state_of_an_optimiser_takes_the_layout_of_its_parameter():
    model = nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = Home({}, {"0/momentum_buffer": torch.randn(3, 2, 3, 3, 3)})
    put(kept, model, (), optimizer)
    [weight, _] = model.parameters()
    restored = optimizer.state[weight]["momentum_buffer"]
    assert restored.stride() == weight.stride()
    assert torch.equal(restored, kept.optimizer["0/momentum_buffer"])


def test_nothing_is_written_for_a_task_that_keeps_nothing(tmp_path):
    HomeFolder(tmp_path / "state", TASK).keep(RUN, NOTHING)
    assert not (tmp_path / "state").exists()


def test_a_copy_is_kept_and_not_the_models_own_tensors():
    model = Headed().model()
    home = taken(model, ("head.*",))
    before = home.model["head.bias"].clone()
    with torch.no_grad():
        model.head.bias.add_(1)
    assert torch.equal(home.model["head.bias"], before)
