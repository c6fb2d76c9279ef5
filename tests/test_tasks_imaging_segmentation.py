"""The segmentation task: loss, whole volumes, Dice, pictures, prediction; phantoms and real MRI."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from imaging_files import (
    affine_of,
    blocks,
    hippocampus_folder,
    phantom_folder,
    ramp,
    series,
    write_bundle,
    write_nifti,
)
from torch.func import functional_call, grad, vmap

from p2pfed.errors import ConfigError
from p2pfed.privacy.accountant import Budget, Cost
from p2pfed.privacy.ledger import Ledger
from p2pfed.privacy.records import ReleaseKey
from p2pfed.tasks.hippocampus import Hippocampus, HippocampusOwnNorm
from p2pfed.tasks.phantoms import phantom
from p2pfed.tasks.segmentation import Plan, SegmentationTask, dice_of
from p2pfed.tasks.volumes import Transform
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import HyperParameters, load_task, task_id
from p2pfed.training.vector import check_no_buffers, shared_parameters

PHANTOMS = {"phantoms": 8}


class Small(SegmentationTask):
    """A network that is quick to test with."""

    name = "small"
    hyper = HyperParameters(local_steps=2, batch_size=2, learning_rate=0.01, optimizer="adam")

    def plan(self):
        return Plan(("front", "back"), patch=(16, 16, 16), widths=(4, 8), residual_units=1)


class Oracle(torch.nn.Module):
    """Marks as class 1 what is bright, as class 2 what is dark; sees windows of one size only."""

    def __init__(self, size=None):
        super().__init__()
        self.size, self.weight = size, torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert self.size is None or tuple(x.shape[2:]) == self.size
        return torch.cat([torch.zeros_like(x), x - 1, -x - 1], 1) * self.weight


def one_hot(label, scale=30.0):
    return scale * torch.stack([(label == c).float() for c in range(3)], dim=1)


# --- loss --------------------------------------------------------------------------------------


def test_the_loss_is_per_record_and_small_where_the_model_is_right():
    truth = torch.from_numpy(np.stack([blocks((8, 8, 8))] * 3))
    wrong = truth.flip(1)
    loss = Small().loss(one_hot(torch.stack([truth[0], wrong[1], truth[2]])), truth)
    assert loss.shape == (3,)
    assert float(loss[0]) < 1e-3
    assert float(loss[1]) > 1
    assert float(loss[2]) == float(loss[0])


def test_the_loss_is_cross_entropy_plus_soft_dice_as_written_down():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 4, 5, 6, generator=generator)
    truth = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    entropy = torch.nn.functional.cross_entropy(output, truth, reduction="none").mean((1, 2, 3))
    p = output.softmax(1)
    dice = torch.zeros(2)
    for c in (1, 2):
        t = (truth == c).float()
        both, either = (p[:, c] * t).sum((1, 2, 3)), (p[:, c] + t).sum((1, 2, 3))
        dice += (2 * both + 1) / (either + 1) / 2
    loss = Small().loss(output, truth.to(torch.uint8))
    assert torch.allclose(loss, entropy + 1 - dice, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_loss_never_raises(bad):
    truth = torch.full((2, 4, 4, 4), 250, dtype=torch.uint8)  # no class
    output = torch.zeros(2, 3, 4, 4, 4)
    assert torch.isfinite(Small().loss(output, truth)).all()
    output[0] = bad
    loss = Small().loss(output, truth)
    assert not torch.isfinite(loss[0])
    assert torch.isfinite(loss[1])


def test_half_precision_outputs_give_the_loss_in_full_precision():
    loss = Small().loss(torch.zeros(1, 3, 4, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 4, 4, 4))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(np.log(3) + 1 - 1 / (64 / 3 + 1)), abs=1e-3)


# --- one contribution per patient --------------------------------------------------------------


@pytest.mark.slow
def test_gradients_of_all_patients_at_once_are_those_one_by_one():
    task = Small()
    torch.manual_seed(0)
    model = task.model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 2, 1, 16, 16, 16)
    y = torch.randint(0, 3, (3, 2, 16, 16, 16), dtype=torch.uint8)

    def mean_loss(parameters, x, y):
        return task.loss(functional_call(model, parameters, (x,)), y).mean()

    together = vmap(grad(mean_loss), in_dims=(None, 0, 0))(parameters, x, y)
    for patient in range(3):
        alone = grad(mean_loss)(parameters, x[patient], y[patient])
        for name, slope in alone.items():
            assert torch.allclose(together[name][patient], slope, atol=1e-5), name


@pytest.mark.slow
def test_the_gate_gets_a_row_of_every_patient_vectorised_and_of_him_alone():
    task = Small()
    data = task.data(None, PHANTOMS)
    check_no_buffers(task.model())
    rows = PatientContributions(task, initial_vector(task, seed=0), data.train, seed=4)
    whole = np.concatenate(list(rows.chunks()))
    assert rows._vectorised
    assert whole.shape == (6, rows.num_parameters)
    assert np.isfinite(whole).all()
    assert (np.linalg.norm(whole, axis=1) > 0).all()
    again = PatientContributions(
        task, initial_vector(task, seed=0), data.train, seed=4, chunk_bytes=1
    )
    assert np.allclose(np.concatenate(list(again.chunks())), whole, atol=1e-5)


# --- whole volumes -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 16), (10, 40, 16), (33, 21, 50), (5, 6, 7)])
def test_windows_cover_a_volume_of_any_size_and_change_nothing(shape):
    x = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1))
    output = Small().infer(Oracle((16, 16, 16)), x)
    assert output.shape == (1, 3, *shape)
    assert torch.allclose(output, Oracle()(x), atol=1e-5)


def test_dice_is_per_class_and_absent_classes_do_not_count():
    truth = torch.tensor([1, 1, 0, 0, 0])
    mask = torch.tensor([1, 0, 1, 0, 0])
    assert dice_of(mask, truth, 2) == pytest.approx([0.5, float("nan")], nan_ok=True)
    assert dice_of(truth, truth, 1) == [1.0]
    assert dice_of(torch.full((5,), 2), truth, 2) == [0.0, 0.0]


def write_cases(folder, labels):
    """Cases whose image shows class 1 bright and class 2 dark, so that the oracle is right."""
    for name, (label, shown) in labels.items():
        image = np.array([0.0, 9.0, -9.0], np.float32)[shown]
        image += np.random.default_rng(0).normal(0, 0.01, shown.shape)
        write_nifti(folder / "images" / f"{name}.nii.gz", image.astype(np.float32))
        write_nifti(folder / "labels" / f"{name}.nii.gz", label)
    lines = [f"{name},{name},test" for name in labels]
    lines[0] = lines[0].replace("test", "train")
    (folder / "patients.csv").write_text("\n".join(["case,patient,part", *lines]))
    return folder


def test_metrics_are_mean_dice_of_whole_test_volumes(tmp_path):
    label = blocks((20, 24, 18))
    only_front = np.where(label == 1, label, 0).astype(np.uint8)
    labels = {"a": (label, label), "b": (label, label), "c": (only_front, only_front)}
    labels["d"] = (label, only_front)  # the model misses class 2 wholly
    data = Small().data(write_cases(tmp_path, labels), {})
    values = Small().metrics(Oracle(), data.test)
    assert values["dice_front"] == pytest.approx(1)
    assert values["dice_back"] == pytest.approx(0.5)  # b and d; in c it is nowhere
    assert values["dice"] == pytest.approx(0.75)


def test_no_class_anywhere_gives_no_figure(tmp_path):
    empty = np.zeros((20, 24, 18), np.uint8)
    data = Small().data(write_cases(tmp_path, {"a": (empty, empty), "b": (empty, empty)}), {})
    blind = Oracle()
    torch.nn.init.zeros_(blind.weight)
    assert Small().metrics(blind, data.test) == {}
    assert Small().metrics(Oracle(), data.test)["dice"] == 0  # it marks noise


def test_pictures_are_best_median_and_worst(tmp_path):
    label = blocks((20, 24, 18))
    half = np.where(label == 1, label, 0).astype(np.uint8)
    nothing = np.zeros_like(label)
    labels = {"t": (label, label), "a": (label, half), "b": (label, nothing), "c": (label, label)}
    data = Small().data(write_cases(tmp_path, labels), {})
    best, median, worst = Small().pictures(Oracle(), data.test)
    assert [p.case for p in (best, median, worst)] == ["c", "a", "b"]
    assert best.score == pytest.approx(1)
    assert (best.target == label).all()
    assert (best.predicted == label).all()
    assert best.image.dtype == best.target.dtype == best.predicted.dtype == np.uint8
    assert best.image.shape == label.shape
    assert (best.image.min(), best.image.max()) == (0, 255)
    assert best.spacing == (1.0, 1.0, 1.0)


def test_one_test_case_is_one_picture(tmp_path):
    label = blocks((20, 24, 18))
    data = Small().data(write_cases(tmp_path, {"a": (label, label), "b": (label, label)}), {})
    assert [p.case for p in Small().pictures(Oracle(), data.test)] == ["b"]


# --- prediction --------------------------------------------------------------------------------


class Coarse(Small):
    def plan(self):
        return replace(super().plan(), transform=Transform(spacing=(2.0, 2.0, 2.0)))


@pytest.mark.parametrize(("task", "least"), [(Small(), 0.999), (Coarse(), 0.7)])
def test_a_mask_lies_on_the_image_that_it_was_made_of(tmp_path, task, least):
    label = blocks((20, 24, 18))
    affine = affine_of("LSP", (1.0, 1.5, 1.0))
    bright = np.where(label == 1, 900.0, np.where(label == 2, -900.0, 0.0)).astype(np.float32)
    source = write_nifti(tmp_path / "in" / "new.nii.gz", bright, affine)
    [path] = task.predict_all(Oracle(), source.parent, tmp_path / "out")
    assert path == tmp_path / "out" / "new.nii.gz"
    mask = nib.load(path)
    assert mask.shape == label.shape
    assert np.allclose(mask.affine, affine)
    assert min(dice_of(torch.from_numpy(mask.get_fdata()), torch.from_numpy(label), 2)) > least
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["new.nii.gz"]


def test_a_mask_of_a_series_lies_on_the_series(tmp_path):
    from p2pfed.tasks.dicom import read_series

    folder = series(tmp_path / "s", ramp((18, 20, 16)).astype(np.uint16), spacing=(1.0, 1.0, 2.0))
    mask = Small().predict(Oracle(), [folder], "the image")
    scan = read_series(folder, "x")
    assert mask.shape == scan.voxels.shape
    assert np.allclose(mask.affine, scan.affine)
    bright = np.asarray(mask.dataobj) == 1
    assert scan.voxels[bright].min() > scan.voxels[~bright].max() - 1


def test_a_bad_image_stops_prediction_by_its_number(tmp_path):
    write_nifti(tmp_path / "in" / "a.nii.gz", ramp((20, 20, 20)))
    (tmp_path / "in" / "secret.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="case 2 of 2, image: is not a whole") as caught:
        Small().predict_all(Oracle(), tmp_path / "in", tmp_path / "out")
    assert "secret" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    source = write_nifti(tmp_path / "a.nii.gz", ramp((20, 20, 20)))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write to"):
        Small().predict_all(Oracle(), source, tmp_path / "out")


# --- data --------------------------------------------------------------------------------------


def test_without_a_folder_the_task_says_how_to_get_phantoms(tmp_path):
    for folder in (None, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="phantoms = 24"):
            Small().data(folder, {})
        assert Small().data(folder, PHANTOMS).train.num_patients == 6


def test_a_folder_that_is_there_goes_before_phantoms(tmp_path):
    folder = phantom_folder(tmp_path, 12)
    data = Small().data(folder, PHANTOMS)
    assert data.train.num_patients + data.test.num_patients == 12


def test_phantoms_are_a_function_of_their_number():
    (image,), label = phantom(3)
    (again,), same_label = phantom(3)
    (other,), _ = phantom(4)
    assert np.array_equal(image.voxels, again.voxels)
    assert np.array_equal(label.voxels, same_label.voxels)
    assert image.voxels.shape != other.voxels.shape
    assert set(np.unique(label.voxels)) == {0, 1, 2}
    front, back = (np.argwhere(label.voxels == c)[:, 1].mean() for c in (1, 2))
    assert front > back
    near = {c: np.argwhere(label.voxels == c) for c in (1, 2)}
    gaps = np.abs(near[1][:, None] - near[2][None]).max(-1)
    assert gaps.min() == 1  # they touch


def test_phantoms_in_memory_and_as_files_are_the_same_patients(tmp_path):
    task = Small()
    made = task.data(None, {"phantoms": 4})
    read = task.data(phantom_folder(tmp_path, 4), {"cache": "off"})
    mine = dict([*made.train.whole(), *made.test.whole()])
    theirs = dict([*read.train.whole(), *read.test.whole()])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].image, theirs[name].image) for name in mine)
    assert all(torch.equal(mine[name].label, theirs[name].label) for name in mine)


def test_made_hospitals_of_phantoms_share_no_patient():
    parts = [Small().data(None, {"phantoms": 16, "site": s, "sites": 4}) for s in range(4)]
    names = [n for p in parts for n in (*p.train.patient_records(), *p.test.patient_records())]
    assert len(names) == len(set(names)) == 16


@pytest.mark.parametrize(
    "options",
    [
        {"site": 0},
        {"sites": 4},
        {"site": 4, "sites": 4},
        {"site": "north", "sites": 4},
        {"site": 0, "sites": 0},
        {"cache": "sometimes"},
        {"phantoms": 2},
        {"phantoms": "many"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"train\.options"):
        Small().data(None, PHANTOMS | options)


@pytest.mark.parametrize("options", [{}, {"site": 0, "sites": 2}, {"site": 1, "sites": 2}])
def test_a_bad_case_is_told_by_its_number_in_the_folder_and_not_by_its_name(tmp_path, options):
    folder = phantom_folder(tmp_path, 8)
    data = Small().data(folder, options)
    for part in (data.train, data.test):  # the last of a part is not first in anything
        name = list(part.whole())[-1][0]
        path = folder / "images" / f"{name}.nii.gz"
        whole = path.read_bytes()
        path.write_bytes(whole[:2000])
        number = int(name.removeprefix("phantom_")) + 1
        with pytest.raises(ConfigError, match=f"case {number} of 8, image") as caught:
            Small().data(folder, options)
        assert name not in str(caught.value)
        with pytest.raises(ConfigError, match=f"case {number} of 8, image"):  # one number for both
            Small().predict_all(Oracle(), folder, tmp_path / "out")
        path.write_bytes(whole)


class SmallToo(Small):
    name = "small-too"


def test_two_tasks_on_one_folder_know_the_same_patients_by_one_name(tmp_path):
    folder = phantom_folder(tmp_path / "p", 8)
    bundle = load_task("bundle", {"bundle": str(write_bundle(tmp_path / "bundle"))})
    known = Small().data(folder, {})
    assert len(set(known.train.patient_records())) == known.train.num_patients
    for task in (SmallToo(), bundle):
        data = task.data(folder, {})
        assert data.train.patient_records() == known.train.patient_records()
        assert data.test.patient_records() == known.test.patient_records()
    made = SmallToo().data(None, PHANTOMS)
    assert made.train.patient_records() == Small().data(None, PHANTOMS).train.patient_records()


def test_what_one_task_has_spent_is_spent_for_the_other_and_for_every_site(tmp_path):
    folder = phantom_folder(tmp_path / "p", 8)
    with Ledger.open(tmp_path / "ledger") as ledger:
        first = ledger.register("small", Small().data(folder, {}).train.patient_records())
        ledger.debit(
            first,
            key=ReleaseKey(b"run", 0),
            cost=Cost(100_000_000, None),  # rho .1
            mechanism="gaussian",
            unit="patient",
            relation="zero-out",
            budget=Budget(100.0, 1e-5),
        )
        for site in range(2):
            data = SmallToo().data(folder, {"site": site, "sites": 2})
            other = ledger.register("small-too", data.train.patient_records())
            assert other != first
            assert ledger.spent(other, delta=1e-5) == ledger.spent(first, delta=1e-5)


def test_a_disk_cache_goes_where_the_option_says_else_to_the_trainers_own_folder(tmp_path):
    folder = phantom_folder(tmp_path / "p", 8)
    options = {"cache": "disk", "cache_folder": str(tmp_path / "cache")}
    data = Small().data(folder, options)
    assert len(list((tmp_path / "cache").iterdir())) == 8
    assert not data.train._shelf.is_in_memory
    task = Small()
    task.own_folder = tmp_path / "trainer"
    task.data(folder, {"cache": "disk"})
    assert len(list((tmp_path / "trainer" / "volumes").iterdir())) == 8


def test_without_a_folder_of_its_own_a_task_leaves_no_patient_on_the_disk(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "CACHE_DIRECTORY", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    task, notes = Small(), []
    task.note = notes.append
    data = task.data(phantom_folder(tmp_path / "p", 8), {"cache": "disk"})
    assert not data.train._shelf.is_in_memory
    assert not (tmp_path / "home").exists()
    assert "no folder is known" in notes[0]


def test_reading_tells_how_far_it_is(tmp_path):
    told = []
    task = Small()
    task.progress = lambda done, total: told.append((done, total))
    task.data(None, {"phantoms": 4})
    assert told == [(0, 3), (1, 3), (2, 3), (0, 1)]


def test_a_patch_that_the_network_cannot_halve_is_refused():
    class Odd(Small):
        def plan(self):
            return replace(super().plan(), patch=(16, 15, 16))

    with pytest.raises(ConfigError, match="no multiple of 2"):
        Odd().model()


# --- identity ----------------------------------------------------------------------------------


def test_the_bundled_tasks_are_told_apart():
    tasks = [load_task("segmentation"), load_task("hippocampus"), HippocampusOwnNorm()]
    assert len({task_id(task) for task in tasks}) == 3
    assert task_id(Hippocampus()) == task_id(load_task("hippocampus"))


def test_normalisation_stays_at_home_by_its_name():
    task = HippocampusOwnNorm()
    model = task.model()
    shared = {name for name, _ in shared_parameters(model, task.private_parameters)}
    home = {name for name, _ in model.named_parameters()} - shared
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.InstanceNorm3d)
        for part in ("weight", "bias")
    }
    assert home == norms
    assert len(home) > 0


def test_the_hippocampus_network_is_small():
    assert initial_vector(Hippocampus(), seed=0).size == 122_913


# --- training ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_on_phantoms_learns():
    task = Hippocampus()
    data = task.data(None, {"phantoms": 12})
    start = initial_vector(task, seed=0)
    how = {"learning_rate": task.hyper.learning_rate, "batch_size": 4, "seed": 0}
    trained = train_local(task, data.train, start, steps=60, **how).vector
    assert evaluate(task, start, data.test)["dice"] < 0.2
    assert evaluate(task, trained, data.test)["dice"] > 0.55


@pytest.mark.slow
def test_training_on_real_volumes_learns():
    task = Hippocampus()
    data = task.data(hippocampus_folder(), {"site": 0, "sites": 4})
    assert (data.train.num_patients, data.test.num_patients) == (18, 6)
    how = {"learning_rate": task.hyper.learning_rate, "batch_size": 4, "seed": 0}
    start = initial_vector(task, seed=0)
    trained = train_local(task, data.train, start, steps=100, **how).vector
    values = evaluate(task, trained, data.test)
    assert values["dice"] > 0.75
    assert set(values) == {"dice", "dice_anterior", "dice_posterior"}
    model = task.model()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(trained), model.parameters())
    pictures = task.pictures(model.eval(), data.test)
    assert [p.score for p in pictures] == sorted((p.score for p in pictures), reverse=True)


@pytest.mark.slow
def test_real_volumes_are_read_as_nibabel_reads_them():
    folder = hippocampus_folder()
    data = Hippocampus().data(folder, {})
    assert data.train.num_patients + data.test.num_patients == 64
    for name, volume in (*data.train.whole(), *data.test.whole()):
        label = nib.load(folder / "labels" / f"{name}.nii.gz")
        assert np.array_equal(volume.label.numpy(), nib.as_closest_canonical(label).get_fdata())
