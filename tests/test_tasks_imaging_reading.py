"""Volumes from NIfTI files and DICOM series: where they lie, what is refused, the way back."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from imaging_files import affine_of, blocks, ramp, series, slice_of, write_nifti, write_series

from p2pfed.errors import ConfigError
from p2pfed.tasks.dicom import read_series
from p2pfed.tasks.scans import check_same_grid, read_nifti
from p2pfed.tasks.volumes import Transform, read_volume, restore, volume_of

SHAPE = (6, 8, 10)
ORIENTATIONS = [
    "".join(sign[axis] for axis, sign in zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product(("RAS", "LPI"), repeat=3)
]


def read(images, label=None, transform=None, classes=2):
    images = [images] if isinstance(images, Path) else images
    return read_volume(
        images, label, transform or Transform(), classes=classes, where="case 1 of 1"
    )


def refusal(call, *arguments, **keywords):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


# --- orientation, spacing, grey values ---------------------------------------------------------


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_becomes_ras_and_goes_back_bit_for_bit(tmp_path, axes):
    affine = affine_of(axes, (1.0, 2.0, 3.0))
    image = write_nifti(tmp_path / "image.nii", ramp(SHAPE), affine)
    label = write_nifti(tmp_path / "label.nii", blocks(SHAPE), affine)
    volume = read(image, label)
    canonical = nib.as_closest_canonical(nib.load(label))
    assert np.array_equal(volume.label, canonical.get_fdata())
    assert volume.image.shape == (1, *canonical.shape)
    assert volume.geometry.spacing == pytest.approx(canonical.header.get_zooms())
    mask = restore(volume.label, volume.geometry)
    assert np.array_equal(np.asarray(mask.dataobj), blocks(SHAPE))
    assert np.array_equal(mask.affine, affine)
    assert mask.get_data_dtype() == np.uint8


def test_an_oblique_volume_goes_back_too(tmp_path):
    turn = nib.eulerangles.euler2mat(0.2, -0.1, 0.3)
    affine = nib.affines.from_matvec(turn @ np.diag([1.0, 0.8, 1.2]), [4.0, 5.0, 6.0])
    label = write_nifti(tmp_path / "label.nii.gz", blocks(SHAPE), affine)
    volume = read(label, label)
    mask = restore(volume.label, volume.geometry)
    assert np.array_equal(np.asarray(mask.dataobj), blocks(SHAPE))
    assert np.allclose(mask.affine, nib.load(label).affine)


def test_resampling_keeps_the_place_of_things(tmp_path):
    affine = affine_of("RAS", (1.0, 1.0, 4.0))
    image = write_nifti(tmp_path / "i.nii", blocks((16, 20, 8)).astype(np.float32), affine)
    label = write_nifti(tmp_path / "l.nii", blocks((16, 20, 8)), affine)
    volume = read(image, label, Transform(spacing=(2.0, 2.0, 2.0), window=(0.0, 2.0)))
    assert volume.image.shape == (1, 8, 10, 16)
    assert volume.geometry.spacing == (2.0, 2.0, 2.0)
    # What was inside a structure is inside it at the new spacing: image and label agree there.
    inside = volume.label == 2
    assert inside.sum() > 20
    assert volume.image[0][inside].mean() > 0.8
    back = np.asarray(restore(volume.label, volume.geometry).dataobj)
    assert back.shape == (16, 20, 8)
    overlap = 2 * (back == blocks((16, 20, 8)))[back > 0].sum()
    assert overlap / ((back > 0).sum() + (blocks((16, 20, 8)) > 0).sum()) > 0.7


def test_a_resampled_ramp_has_the_values_of_its_places():
    from p2pfed.tasks.scans import Scan

    along = np.broadcast_to(np.arange(12.0)[:, None, None], (12, 5, 5))
    scan = Scan(along, np.eye(4))
    whole = Transform(spacing=(2.0, 1.0, 1.0), window=(0.0, 1000.0))
    volume = volume_of([scan], None, whole, classes=1, where="x")
    # Voxel i of the new volume covers the old 2i and 2i + 1.
    assert volume.image[0, :, 0, 0] * 1000 == pytest.approx(np.arange(6) * 2 + 0.5)


def test_grey_values_are_scaled_by_the_volume_alone(tmp_path):
    first = write_nifti(tmp_path / "a.nii", ramp(SHAPE))
    scaled = write_nifti(tmp_path / "b.nii", 1000 + 7 * ramp(SHAPE))
    one, other = read(first).image, read(scaled).image
    assert np.allclose(one, other, atol=1e-4)
    assert abs(one.mean()) < 1e-5
    assert one.std() == pytest.approx(1, abs=1e-4)
    even = write_nifti(tmp_path / "c.nii", np.full(SHAPE, 5.0))
    assert not read(even).image.any()


def test_a_window_maps_public_grey_values_to_0_and_1(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.array([[[-100.0, -57.0, 53.5, 164.0, 900.0]]]))
    image = read(path, transform=Transform(window=(-57.0, 164.0))).image
    assert image.ravel() == pytest.approx([0, 0, 0.5, 1, 1])


def test_channels_are_stacked_in_their_order(tmp_path):
    one = write_nifti(tmp_path / "a.nii.gz", ramp(SHAPE))
    two = write_nifti(tmp_path / "b.nii.gz", -ramp(SHAPE))
    image = read([one, two]).image
    assert image.shape == (2, *SHAPE)
    assert np.allclose(image[0], -image[1], atol=1e-6)


# --- what is refused of NIfTI files ------------------------------------------------------------


def test_a_packed_file_that_is_cut_off_or_damaged_is_refused(tmp_path):
    path = write_nifti(tmp_path / "secret_name.nii.gz", ramp((12, 12, 12)))
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    wrong_checksum = content[:-8] + bytes(4) + content[-4:]
    for bad in (content[: len(content) // 2], content[:-1], bytes(damaged), wrong_checksum, b""):
        path.write_bytes(bad)
        text = refusal(read, path)
        assert text.startswith("case 1 of 1, image: is not a whole NIfTI file")
        assert "secret" not in text


def test_an_unpacked_file_that_is_cut_off_or_no_nifti_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii", ramp(SHAPE))
    for bad in (path.read_bytes()[:-1], path.read_bytes()[:200], b"hello", bytes(348)):
        path.write_bytes(bad)
        assert "is not a whole NIfTI file" in refusal(read, path)
    assert "cannot be read" in refusal(read, tmp_path / "missing.nii")


def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path):
    path = write_nifti(tmp_path / "a.nii", ramp(SHAPE))
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(content)
    assert "is not a whole NIfTI file" in refusal(read, path)


def test_a_file_of_two_gzip_members_is_read_whole(tmp_path):
    plain = write_nifti(tmp_path / "a.nii", ramp(SHAPE)).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    assert np.array_equal(read_nifti(path, "x").voxels, ramp(SHAPE))


def test_nifti_2_is_read(tmp_path):
    nib.save(nib.Nifti2Image(ramp(SHAPE), np.eye(4)), tmp_path / "a.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "a.nii.gz", "x").voxels, ramp(SHAPE))


def test_only_one_3d_volume_per_file_is_taken(tmp_path):
    assert "has 2 dimensions" in refusal(read, write_nifti(tmp_path / "a.nii", ramp((4, 5))))
    assert "has 4 dimensions" in refusal(read, write_nifti(tmp_path / "b.nii", ramp((4, 5, 6, 2))))
    flat = write_nifti(tmp_path / "c.nii", ramp((4, 5, 6, 1)))
    assert read(flat).image.shape == (1, 4, 5, 6)


def test_nan_colours_and_impossible_spacing_are_refused(tmp_path):
    holed = ramp(SHAPE)
    holed[2, 3, 4] = np.nan
    assert "holds NaN" in refusal(read, write_nifti(tmp_path / "a.nii", holed))
    complex_ = write_nifti(tmp_path / "b.nii", ramp(SHAPE).astype(np.complex64))
    assert "complex" in refusal(read, complex_)
    far = write_nifti(tmp_path / "c.nii", ramp(SHAPE), np.diag([1.0, 1.0, 1e6, 1.0]))
    assert "lies nowhere" in refusal(read, far)
    flat = np.eye(4)
    flat[:3, 1] = flat[:3, 0]
    image = nib.Nifti1Image(ramp(SHAPE), None)
    image.header.set_sform(flat, code=1)
    nib.save(image, tmp_path / "d.nii")
    assert "lies nowhere" in refusal(read, tmp_path / "d.nii")


# --- image and label ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "spacing", "shift", "word"),
    [
        ("LAS", (1.0, 1.0, 1.0), 0.0, "orientation"),
        ("RPS", (1.0, 1.0, 1.0), 0.0, "orientation"),
        ("RAS", (1.0, 1.0, 2.0), 0.0, "spacing"),
        ("RAS", (1.0, 1.0, 1.0), 0.5, "position"),
    ],
)
def test_a_label_on_another_grid_is_refused_and_the_difference_named(
    tmp_path, axes, spacing, shift, word
):
    image = write_nifti(tmp_path / "i.nii", ramp(SHAPE), affine_of("RAS"))
    affine = affine_of(axes, spacing)
    affine[:3, 3] += shift
    label = write_nifti(tmp_path / "l.nii", blocks(SHAPE), affine)
    text = refusal(read, image, label)
    assert f"case 1 of 1, label: has another {word} than the image" in text


def test_rounding_of_an_affine_is_not_another_grid(tmp_path):
    image = write_nifti(tmp_path / "i.nii", ramp(SHAPE), affine_of("RAS"))
    nearly = affine_of("RAS") + 1e-4
    nearly[3] = (0, 0, 0, 1)
    assert read(image, write_nifti(tmp_path / "l.nii", blocks(SHAPE), nearly)).label is not None


def test_another_shape_of_label_or_channel_is_refused(tmp_path):
    image = write_nifti(tmp_path / "i.nii", ramp(SHAPE))
    other = write_nifti(tmp_path / "l.nii", blocks((6, 8, 9)))
    assert "label: has another shape" in refusal(read, image, other)
    assert "another channel: has another shape" in refusal(read, [image, other])


def test_labels_that_are_no_classes_are_refused_without_their_values(tmp_path):
    image = write_nifti(tmp_path / "i.nii", ramp(SHAPE))
    for wrong in (blocks(SHAPE) * 7, -blocks(SHAPE).astype(np.int16)):
        text = refusal(read, image, write_nifti(tmp_path / "l.nii", wrong))
        assert "a class that the task does not have" in text
        assert "0 to 2" in text
        assert "14" not in text
    halves = blocks(SHAPE).astype(np.float32) * 0.5
    assert "holds fractions" in refusal(read, image, write_nifti(tmp_path / "l.nii", halves))


def test_whole_numbers_stored_as_floats_are_labels(tmp_path):
    image = write_nifti(tmp_path / "i.nii", ramp(SHAPE))
    label = write_nifti(tmp_path / "l.nii", blocks(SHAPE).astype(np.float32))
    assert np.array_equal(read(image, label).label, blocks(SHAPE))


# --- DICOM series ------------------------------------------------------------------------------


def stored(shape=(5, 7, 4)):
    return ramp(shape).astype(np.uint16)


def test_a_series_is_sorted_by_place_scaled_and_turned_to_ras(tmp_path):
    folder = series(tmp_path / "s", stored(), spacing=(0.5, 0.75, 2.0))
    scan = read_series(folder, "x")
    assert np.array_equal(scan.voxels, stored() * 2.0 - 1000)
    assert scan.spacing == pytest.approx((0.5, 0.75, 2.0))
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    # The first voxel is 5 mm to the right (-L) and 6 mm behind; the last is one volume further.
    assert scan.affine @ [0, 0, 0, 1] == pytest.approx([5.0, -6.0, 10.0, 1])
    assert scan.affine @ [4, 6, 3, 1] == pytest.approx([5 - 2.0, -6 - 4.5, 10 + 6.0, 1])


def test_a_series_and_the_same_volume_as_nifti_are_one(tmp_path):
    folder = series(tmp_path / "s", stored())
    scan = read_series(folder, "x")
    path = write_nifti(tmp_path / "v.nii.gz", scan.voxels.astype(np.float32), scan.affine)
    check_same_grid(scan, read_nifti(path, "y"), "y")
    assert np.allclose(read(folder).image, read(path).image)
    mask = restore((read(folder).image[0] > 0).astype(np.uint8), read(folder).geometry)
    assert mask.shape == (5, 7, 4)
    assert np.allclose(mask.affine, scan.affine)


def test_a_sagittal_series_lies_where_it_was_taken(tmp_path):
    slices = [slice_of(stored(), k) for k in range(4)]
    for k, one in enumerate(slices):
        one.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # rows to the back, columns to the feet
        one.ImagePositionPatient = [-k * 3.0, 0.0, 0.0]
    scan = read_series(write_series(tmp_path / "s", slices), "x")
    # Along the normal (-L = to the right) the order is that of k.
    assert nib.aff2axcodes(scan.affine) == ("P", "I", "R")
    assert scan.spacing == pytest.approx((1, 1, 3))
    assert np.array_equal(scan.voxels, stored() * 2.0 - 1000)


def change_one(**facts):
    def change(slices):
        for name, value in facts.items():
            setattr(slices[2], name, value)

    return change


def smaller(slices):
    slices[2] = slice_of(stored((5, 6, 6)), 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.clear(), "a series of 0 slices"),
        (lambda s: s.__delitem__(slice(1, None)), "a series of 1 slices"),
        (lambda s: s.pop(2), "slices are missing"),
        (lambda s: s.append(s[2]), "two slices lie at one place"),
        (change_one(SeriesInstanceUID="1.2.4"), "several series are mixed"),
        (change_one(PixelSpacing=[1, 2]), "differ in spacing"),
        (change_one(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "differ in direction"),
        (change_one(ImagePositionPatient=[3, 6, 12]), "not evenly spaced on one line"),
        (change_one(ImagePositionPatient=[-5, 6, 12.3]), "not evenly spaced on one line"),
        (change_one(NumberOfFrames=3), "holds several frames"),
        (change_one(PhotometricInterpretation="MONOCHROME1"), "inverted grey values"),
        (change_one(PixelData=bytes(10)), "is not a whole DICOM image"),
        (smaller, "differ in size"),
    ],
)
def test_a_series_that_is_not_whole_is_refused_and_says_why(tmp_path, change, text):
    slices = [slice_of(stored((5, 7, 6)), k) for k in range(6)]
    change(slices)
    told = refusal(read_series, write_series(tmp_path / "secret_folder", slices), "case 3 of 17")
    assert told.startswith("case 3 of 17")
    assert text in told
    assert "ecret" not in told


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "PixelSpacing", "PixelData", "Rows"])
def test_a_slice_without_what_is_needed_is_refused_by_its_number(tmp_path, missing):
    slices = [slice_of(stored(), k) for k in range(4)]
    delattr(slices[1], missing)
    names = [f"{k}.dcm" for k in range(4)]
    told = refusal(read_series, write_series(tmp_path / "s", slices, names), "case 1 of 2")
    assert told.startswith("case 1 of 2, slice 2 of 4: is not a whole DICOM image")


def test_a_corrupt_or_foreign_file_in_a_series_is_refused_by_its_number(tmp_path):
    folder = series(tmp_path / "s", stored())
    last = max(folder.iterdir())
    content = last.read_bytes()
    for bad in (b"not dicom", content[: len(content) // 2], content[:300], b""):
        last.write_bytes(bad)
        assert "slice 4 of 4: is not a whole DICOM image" in refusal(read_series, folder, "case 1")


def test_hidden_files_and_an_index_are_no_slices(tmp_path):
    folder = series(tmp_path / "s", stored())
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "DICOMDIR").write_bytes(b"x")
    assert read_series(folder, "x").voxels.shape == (5, 7, 4)


def test_a_label_of_a_mixed_up_series_is_refused(tmp_path):
    folder = series(tmp_path / "s", stored())
    label = write_nifti(tmp_path / "label.nii.gz", blocks((5, 7, 4)))  # RAS at the origin
    assert "has another orientation" in refusal(read, folder, label)
