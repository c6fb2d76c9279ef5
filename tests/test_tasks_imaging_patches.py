"""Cached volumes and patches: the same from memory, disk and files; a function of the patient."""

from __future__ import annotations

import stat
import threading
from dataclasses import replace
from itertools import islice
from random import Random

import numpy as np
import pytest
import torch
from imaging_files import blocks, phantom_folder, ramp, series, write_nifti
from safetensors import SafetensorError

from p2pfed.errors import ConfigError
from p2pfed.tasks import cache
from p2pfed.tasks.cache import Shelf, prepared
from p2pfed.tasks.cases import Case, find_cases
from p2pfed.tasks.patches import Cut, Volumes, cut
from p2pfed.tasks.scans import Scan
from p2pfed.tasks.volumes import Transform, read_volume, volume_of
from p2pfed.training.patients import Part

CUT = Cut((8, 10, 6), per_patient=3)
KEPT = Transform()


def shelf_of(folder, mode="memory", place=None, reads=None, transform=KEPT, note=None):
    cases = find_cases(folder, channels=1, classes=2)

    def read(number):
        if reads is not None:
            reads.append(number)
        case, where = cases[number], f"case {number + 1} of {len(cases)}"
        return read_volume(case.images, case.label, transform, classes=2, where=where)

    shelf = Shelf(cases, read, transform=transform, classes=2, mode=mode, folder=place, note=note)
    return shelf, cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return phantom_folder(tmp_path_factory.mktemp("phantoms"), 5)


@pytest.fixture(scope="module")
def volumes(folder):
    return Volumes(*shelf_of(folder), CUT)


def same(one, other):
    return (
        torch.equal(one.image, other.image)
        and torch.equal(one.label, other.label)
        and torch.equal(one.marked, other.marked)
        and (one.counts, one.spacing) == (other.counts, other.spacing)
    )


# --- the shelf ---------------------------------------------------------------------------------


def test_memory_disk_and_files_give_the_same_volumes(folder, tmp_path):
    kept, _ = shelf_of(folder)
    read, _ = shelf_of(folder, "off")
    first, _ = shelf_of(folder, "disk", tmp_path / "cache")
    again, _ = shelf_of(folder, "disk", tmp_path / "cache")
    assert len(kept) == 5
    for number in range(5):
        assert same(kept[number], read[number])
        assert same(kept[number], first[number])
        assert same(kept[number], again[number])


def test_each_way_reads_files_as_often_as_it_says(folder, tmp_path):
    for mode, made, used in (("memory", 5, 0), ("disk", 5, 0), ("off", 5, 2), ("auto", 5, 0)):
        reads = []
        shelf, _ = shelf_of(folder, mode, tmp_path / mode, reads)
        assert len(reads) == made
        assert same(shelf[3], shelf[3])
        assert len(reads) == made + used
        assert shelf.is_in_memory == (mode in ("memory", "auto"))
    reads = []
    shelf_of(folder, "disk", tmp_path / "disk", reads)
    assert reads == []  # a second start finds them on disk


def test_what_does_not_fit_in_memory_goes_to_disk(folder, tmp_path, monkeypatch):
    kept, _ = shelf_of(folder)
    room = kept[0].nbytes + kept[1].nbytes + 1
    monkeypatch.setattr(cache, "free_memory", lambda: 2 * room)
    shelf, _ = shelf_of(folder, "auto", tmp_path / "cache")
    assert not shelf.is_in_memory
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert all(same(shelf[n], kept[n]) for n in range(5))


def test_the_cache_is_for_its_owner_alone(folder, tmp_path):
    place = tmp_path / "cache"
    shelf_of(folder, "disk", place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in place.iterdir()} == {0o600}
    assert not any("phantom" in p.name for p in place.iterdir())
    place.chmod(0o750)
    for path in place.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="can be read by others"):
        shelf_of(folder, "disk", place)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_cache_file_is_made_anew(folder, tmp_path, damage):
    place = tmp_path / "cache"
    kept, _ = shelf_of(folder, "disk", place)
    good = [kept[n].image.clone() for n in range(5)]
    victim = sorted(place.iterdir())[2]
    content = victim.read_bytes()
    victim.unlink()
    flipped = content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]
    if damage != "gone":
        victim.write_bytes({"flipped": flipped, "cut": content[:-7], "empty": b""}[damage])
    reads = []
    shelf, _ = shelf_of(folder, "disk", place, reads)
    assert len(reads) == 1
    assert all(torch.equal(shelf[n].image, good[n]) for n in range(5))
    assert victim.read_bytes() == content
    assert not list(place.glob("*.partial"))


def test_another_file_or_transform_is_another_entry(tmp_path):
    source = phantom_folder(tmp_path / "p", 2)
    place, reads = tmp_path / "cache", []
    shelf_of(source, "disk", place, reads)
    shelf_of(source, "disk", place, reads, Transform(spacing=(2.0, 2.0, 2.0)))
    assert len(reads) == 4
    image = source / "images" / "phantom_001.nii.gz"
    image.write_bytes(image.read_bytes() + b"\0")
    shelf_of(source, "disk", place, reads)
    assert reads[4:] == [1]


def test_a_series_that_changes_is_read_anew(tmp_path):
    case = tmp_path / "p" / "anna"
    series(case / "image", ramp((5, 7, 4)))
    from p2pfed.tasks.dicom import read_series

    affine = read_series(case / "image", "x").affine
    write_nifti(case / "label.nii.gz", blocks((5, 7, 4)), affine)
    reads = []
    shelf_of(tmp_path / "p", "disk", tmp_path / "cache", reads)
    series(case / "image", ramp((5, 7, 4)) + 1)
    shelf_of(tmp_path / "p", "disk", tmp_path / "cache", reads)
    assert reads == [0, 0]


def test_halves_are_as_good_as_floats():
    values = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    values[0, 0] = 1e4  # some bright voxels
    volume = volume_of([Scan(values, np.eye(4))], None, Transform(), classes=1, where="x")
    volume = replace(volume, label=np.zeros((20, 20, 20), np.uint8))
    apart = prepared(volume, classes=1).image.float() - torch.from_numpy(volume.image)
    assert float(apart.abs().max()) < 0.005


def a_full_disk(tensors, path, metadata):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def no_folder_can_be_made(folder):
    (folder.parent / "file").write_text("")
    return folder.parent / "file" / "cache"


@pytest.mark.parametrize("trouble", ["full", "unwritable", "read by others", "no folder"])
def test_where_the_disk_cannot_be_used_auto_goes_on_without_and_says_so_once(
    folder, tmp_path, monkeypatch, trouble
):
    kept, _ = shelf_of(folder)
    monkeypatch.setattr(cache, "free_memory", lambda: 2 * (kept[0].nbytes + 1))
    place, notes, reads = tmp_path / "cache", [], []
    place.mkdir(mode=0o755 if trouble == "read by others" else 0o700)
    if trouble == "full":
        monkeypatch.setattr(cache, "save_file", a_full_disk)
    if trouble == "unwritable":
        place = no_folder_can_be_made(place)
    shelf, _ = shelf_of(
        folder, "auto", None if trouble == "no folder" else place, reads, note=notes.append
    )
    assert not shelf.is_in_memory
    assert all(same(shelf[n], kept[n]) for n in range(5))
    assert len(reads) == 5 + 4  # only the first is in memory
    [note] = notes
    assert "no volumes are kept on disk" in note
    assert not any(name in note for name in ("phantom", str(tmp_path)))
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"] == []


@pytest.mark.parametrize(
    ("trouble", "text"), [("full", "the disk may be full"), ("unwritable", "Not a directory")]
)
def test_a_disk_that_was_asked_for_by_name_and_fails_is_told(
    folder, tmp_path, monkeypatch, trouble, text
):
    place = tmp_path / "cache"
    if trouble == "full":
        monkeypatch.setattr(cache, "save_file", a_full_disk)
    else:
        place = no_folder_can_be_made(place)
    with pytest.raises(ConfigError, match=f"cannot be written\n.*{text}") as caught:
        shelf_of(folder, "disk", place)
    assert '"auto", which goes on without' in caught.value.do
    assert not list(tmp_path.rglob("*.partial"))


def test_folders_above_the_cache_are_for_their_owner_alone_too(folder, tmp_path):
    shelf_of(folder, "disk", tmp_path / "trainer" / "volumes")
    assert stat.S_IMODE((tmp_path / "trainer").stat().st_mode) == 0o700


# --- cutting -----------------------------------------------------------------------------------


def one_volume(shape, label=None):
    label = blocks(shape) if label is None else label
    scan = Scan(ramp(shape), np.eye(4))
    whole = Transform(window=(0.0, float(np.prod(shape))))
    return prepared(
        volume_of([scan], Scan(label, np.eye(4)), whole, classes=2, where="x"), classes=2
    )


def test_a_patch_is_a_piece_of_the_volume_with_its_label():
    volume = one_volume((16, 20, 12))
    for seed in range(20):
        x, y = cut(volume, CUT, Random(seed))
        assert x.shape == (1, 8, 10, 6)
        assert x.dtype == torch.float32
        assert y.dtype == torch.uint8
        pieces = volume.image[0].float().unfold(0, 8, 1).unfold(1, 10, 1).unfold(2, 6, 1)
        [place] = (pieces == x[0]).all((3, 4, 5)).nonzero().tolist()
        a, b, c = place
        assert torch.equal(y, volume.label[a : a + 8, b : b + 10, c : c + 6])


def test_a_smaller_volume_is_padded_on_both_sides():
    volume = one_volume((4, 20, 5))
    x, y = cut(volume, CUT, Random(1))
    assert not x[:, :2].any()
    assert not x[:, 6:].any()
    assert x[:, 2:6].any()
    assert not y[:, :, 5:].any()
    whole_x, whole_y = cut(volume, Cut((10, 24, 9)), Random(1))
    assert torch.equal(whole_x[0, 3:7, 2:22, 2:7], volume.image[0].float())
    assert torch.equal(whole_y[3:7, 2:22, 2:7], volume.label)
    assert int(whole_y.count_nonzero()) == int(volume.label.count_nonzero())


def test_half_of_the_patches_are_centred_on_the_classes_equally_often():
    label = np.zeros((40, 40, 40), np.uint8)
    label[25:35, 25:35, 25:35] = 1  # 1000 voxels of one class against one of the other
    label[5, 5, 5] = 2
    volume = one_volume((40, 40, 40), label)
    seen = [set(cut(volume, Cut((4, 4, 4)), Random(i))[1].unique().tolist()) for i in range(400)]
    assert 75 < sum(1 in s for s in seen) < 140
    assert 75 < sum(2 in s for s in seen) < 130


def test_a_volume_without_any_class_gives_patches_too():
    volume = one_volume((16, 20, 12), np.zeros((16, 20, 12), np.uint8))
    assert not cut(volume, CUT, Random(0))[1].any()


def test_flips_turn_image_and_label_together():
    volume = one_volume((8, 10, 6))
    how = replace(CUT, flips=(0, 2))
    seen = set()
    for seed in range(40):
        x, y = cut(volume, how, Random(seed))
        for flips in ((), (0,), (2,), (0, 2)):
            if torch.equal(y, volume.label.flip(flips)):
                assert torch.equal(x[0], volume.image[0].float().flip(flips))
                seen.add(flips)
    assert len(seen) == 4


# --- patients ----------------------------------------------------------------------------------


def first(batches, count):
    return list(islice(batches, count))


def test_an_epoch_has_a_patch_of_every_patient(volumes):
    batches = first(volumes.batches(2, seed=3), 6)
    assert [len(x) for x, _ in batches] == [2, 2, 1, 2, 2, 1]
    assert batches[0][0].shape == (2, 1, 8, 10, 6)
    assert batches[0][1].shape == (2, 8, 10, 6)
    seen = []
    for epoch in range(2):
        mine = {volumes._record(p, 3, epoch)[0].numpy().tobytes() for p in range(5)}
        some = batches[3 * epoch : 3 * epoch + 3]
        assert {patch.numpy().tobytes() for x, _ in some for patch in x} == mine
        seen.append(mine)
    assert not seen[0] & seen[1]  # the next epoch has other patches


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(volumes):
    one, again, other = (first(volumes.batches(2, seed=s), 7) for s in (1, 1, 2))
    for (x, y), (same_x, same_y), (other_x, _) in zip(one, again, other, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert not torch.equal(x, other_x)
    assert not torch.equal(one[0][0], one[3][0])  # the next epoch has other patches


def test_several_processes_share_each_batch(volumes):
    whole = first(volumes.batches(3, seed=5), 4)
    parts = [first(volumes.batches(3, seed=5, part=Part(rank, 2)), 4) for rank in range(2)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *parts, strict=True):
        assert torch.equal(x[0::2], x0)
        assert torch.equal(x[1::2], x1)
        assert len(y) == len(y0) + len(y1)
    [(x, y)] = first(volumes.batches(1, seed=5, part=Part(1, 2)), 1)
    assert x.shape == (0, 1, 8, 10, 6)
    assert y.shape == (0, 8, 10, 6)


def test_a_contribution_is_of_one_patient_alone(volumes, folder):
    x, y = volumes.stacked([0, 1, 2], seed=9)
    assert x.shape == (3, 3, 1, 8, 10, 6)
    assert y.shape == (3, 3, 8, 10, 6)
    assert not torch.equal(x[0, 0], x[0, 1])
    shelf, cases = shelf_of(folder)
    # Without the others, and in another order, it is the same.
    fewer = Volumes([shelf[1], shelf[4]], [cases[1], cases[4]], CUT)
    assert torch.equal(fewer.stacked([0], seed=9)[0][0], x[1])
    # With another name it is not: chance follows the patient.
    renamed = Volumes([shelf[1]], [replace(cases[1], patient=b"other")], CUT)
    assert not torch.equal(renamed.stacked([0], seed=9)[0][0], x[1])
    assert not torch.equal(volumes.stacked([1], seed=10)[0][0], x[1])


def test_all_patients_are_alike(volumes):
    assert volumes.alike() == [[0, 1, 2, 3, 4]]
    assert volumes.patient_records() == tuple(f"phantom_{i:03d}".encode() for i in range(5))


def test_a_patient_with_several_cases_counts_once_and_shows_each(folder):
    shelf, cases = shelf_of(folder)
    cases = [replace(c, patient=b"anna" if i < 3 else c.patient) for i, c in enumerate(cases)]
    volumes = Volumes(shelf, cases, Cut((50, 60, 50), per_patient=3))
    assert (volumes.num_patients, volumes.num_cases) == (3, 5)
    _, y = volumes.stacked([0], seed=0)
    voxels = [int(patch.count_nonzero()) for patch in y[0]]
    assert voxels == [int(shelf[i].label.count_nonzero()) for i in range(3)]
    assert [name for name, _ in volumes.whole()] == [c.name for c in cases]


def test_groups_are_patients_in_a_row_with_all_their_patches(volumes):
    grouped = volumes.grouped(2)
    assert grouped.num_patients == 3
    assert len(set(grouped.patient_records())) == 3
    assert grouped.stacked([0, 1, 2], seed=1)[0].shape == (3, 6, 1, 8, 10, 6)
    assert grouped.alike() == [[0, 1, 2]]


def test_nobody_in_a_part_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"patients\.csv"):
        Volumes([], [], CUT)


def test_leaving_batches_in_the_middle_leaves_no_thread(volumes):
    batches = volumes.batches(2, seed=0)
    next(batches)
    mine = [t for t in threading.enumerate() if t.name.startswith("patches")]
    assert mine
    batches.close()
    for thread in mine:
        thread.join(5)
        assert not thread.is_alive()


def test_a_case_that_cannot_be_read_later_is_told_by_the_next_batch(folder, tmp_path):
    source = phantom_folder(tmp_path / "p", 2)
    shelf, cases = shelf_of(source, "off")
    volumes = Volumes(shelf, cases, CUT)
    for path in (source / "images").iterdir():
        path.write_bytes(b"gone bad")
    with pytest.raises(ConfigError, match="is not a whole NIfTI file"):
        next(volumes.batches(2, seed=0))


def test_on_the_cpu_nothing_moves(volumes):
    assert volumes.on(torch.device("cpu")) is volumes


def test_on_another_device_volumes_in_memory_move_along(folder):
    shelf, cases = shelf_of(folder)
    volumes = Volumes(shelf, cases, CUT).on(torch.device("meta"))
    assert volumes._shelf[0].image.device.type == "meta"
    assert volumes._shelf[0].marked.device.type == "cpu"
    read, cases = shelf_of(folder, "off")
    assert Volumes(read, cases, CUT).on(torch.device("meta"))._shelf is read


def test_a_case_has_a_name_and_a_volume(volumes):
    name, volume = volumes.case(2)
    assert name == "phantom_002"
    assert volume.image.shape[1:] == volume.label.shape
    assert isinstance(volumes._cases[0], Case)
