"""Cases as they lie on disk: layouts, patients with several cases, who tests, made hospitals."""

from __future__ import annotations

import json

import pytest
from imaging_files import blocks, hippocampus_folder, ramp, series, write_nifti

from p2pfed.errors import ConfigError
from p2pfed.tasks.cases import Case, find_cases, of_site, unlabelled_cases
from p2pfed.tasks.sites import is_test

SHAPE = (6, 8, 10)


def found(folder, channels=1, classes=2):
    return find_cases(folder, channels=channels, classes=classes)


def nnunet(folder, names=("b", "a"), channels=1, **description):
    for name in names:
        for c in range(channels):
            write_nifti(folder / "imagesTr" / f"{name}_{c:04d}.nii.gz", ramp(SHAPE))
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", blocks(SHAPE))
    facts = {
        "channel_names": {str(c): "T1" for c in range(channels)},
        "labels": {"background": 0, "front": 1, "back": 2},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(facts | description))
    return folder


def test_nnunets_folder_is_read_in_the_order_of_names(tmp_path):
    cases = found(nnunet(tmp_path))
    assert [case.name for case in cases] == ["a", "b"]
    assert cases[0].images == (tmp_path / "imagesTr" / "a_0000.nii.gz",)
    assert cases[0].label == tmp_path / "labelsTr" / "a.nii.gz"
    assert (cases[0].patient, cases[0].by_file) == (b"a", True)


def test_nnunets_channels_are_put_together(tmp_path):
    [case] = found(nnunet(tmp_path, ["a"], channels=3), channels=3)
    assert [path.name for path in case.images] == [f"a_000{c}.nii.gz" for c in range(3)]


def test_the_decathlons_folder_without_channel_numbers_is_read(tmp_path):
    write_nifti(tmp_path / "imagesTr" / "h_001.nii.gz", ramp(SHAPE))
    write_nifti(tmp_path / "imagesTr" / "._h_001.nii.gz", ramp(SHAPE))  # as its archives have it
    write_nifti(tmp_path / "labelsTr" / "h_001.nii.gz", blocks(SHAPE))
    facts = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "A", "2": "P"}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert [case.name for case in found(tmp_path)] == ["h_001"]


def test_images_and_labels_side_by_side_are_read(tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        write_nifti(tmp_path / "images" / name, ramp(SHAPE))
    write_nifti(tmp_path / "labels" / "a.nii.gz", blocks(SHAPE))
    write_nifti(tmp_path / "labels" / "b.nii.gz", blocks(SHAPE))
    assert [case.name for case in found(tmp_path)] == ["a", "b"]


def test_a_folder_per_case_with_a_dicom_series_is_read(tmp_path):
    series(tmp_path / "anna" / "image", ramp((5, 7, 4)))
    write_nifti(tmp_path / "anna" / "label.nii.gz", blocks(SHAPE))
    write_nifti(tmp_path / "bert" / "image.nii.gz", ramp(SHAPE))
    write_nifti(tmp_path / "bert" / "label.nii", blocks(SHAPE))
    anna, bert = found(tmp_path)
    assert anna.images == (tmp_path / "anna" / "image",)
    assert bert.images == (tmp_path / "bert" / "image.nii.gz",)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ({"labels": {"background": 0, "all": 1}}, "1 channels and 2 labels"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, "2 channels and 3 labels"),
        ({"file_ending": ".png"}, "another file_ending"),
        ({"labels": 7}, "is not nnU-Net's"),
        ({"labels": {"background": 0, "whole": [1, 2], "back": 2}}, "not the numbers 0 to 2"),
        ({"labels": {"background": 0, "front": 1, "back": 3}}, "not the numbers 0 to 2"),
        ({"labels": {"background": 0, "front": 1, "back": 1}}, "not the numbers 0 to 2"),
        ({"labels": {"background": False, "front": True, "back": 2}}, "not the numbers 0 to 2"),
        ({"labels": {"1": "front", "2": "back", "3": "side"}}, "not the numbers 0 to 2"),
    ],
)
def test_a_description_that_does_not_fit_the_task_is_refused(tmp_path, description, text):
    with pytest.raises(ConfigError, match=text):
        found(nnunet(tmp_path, **description))


def test_images_without_labels_are_refused_and_not_counted(tmp_path):
    folder = nnunet(tmp_path, ["a", "b", "c"])
    (folder / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(ConfigError, match="there are cases without a label"):
        found(folder)
    write_nifti(folder / "labelsTr" / "b.nii.gz", blocks(SHAPE))
    (folder / "imagesTr" / "c_0000.nii.gz").unlink()
    with pytest.raises(ConfigError, match="there are cases that lack an image"):
        found(folder)


def test_a_missing_channel_is_refused(tmp_path):
    folder = nnunet(tmp_path, ["a", "b"], channels=2)
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(ConfigError, match="there are cases that lack an image or a channel"):
        found(folder, channels=2)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="no case in"):
        found(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        found(tmp_path / "missing")


def three(tmp_path, table):
    for name in "abc":
        write_nifti(tmp_path / "images" / f"{name}.nii", ramp(SHAPE))
        write_nifti(tmp_path / "labels" / f"{name}.nii", blocks(SHAPE))
    (tmp_path / "patients.csv").write_text(table)
    return found(tmp_path)


def test_patients_csv_says_whose_a_case_is_and_where_it_goes(tmp_path):
    cases = three(tmp_path, "case,patient,part\na,p7,test\nb,p8,train\nc,p7,test\nold,p9,\n")
    assert [case.patient for case in cases] == [b"p7", b"p8", b"p7"]
    assert [case.test for case in cases] == [True, False, True]
    assert not any(case.by_file for case in cases)


def test_without_a_part_the_patients_name_decides_for_all_his_cases(tmp_path):
    cases = three(tmp_path, "case,patient\na,p3\nb,p0\nc,p3\n")
    assert [case.test for case in cases] == [True, False, True]  # written down


def test_a_patients_csv_with_the_files_own_names_makes_nobody_a_new_patient(tmp_path):
    before = three(tmp_path, "case,patient\na,p1\nb,p1\nc,p1\n")
    (tmp_path / "patients.csv").unlink()
    by_file = found(tmp_path)
    named = three(tmp_path, "\ufeffcase,patient\na,a\nb,b\nc,c\n")  # as a spreadsheet writes it
    assert [case.patient for case in named] == [case.patient for case in by_file]
    assert [case.test for case in named] == [case.test for case in by_file]
    assert {case.patient for case in before} == {b"p1"}


def test_one_folder_in_another_layout_holds_the_same_patients(tmp_path):
    numbered = found(nnunet(tmp_path / "nn", ["a", "b"], channels=2), channels=2)
    for name in "ab":
        write_nifti(tmp_path / "plain" / "images" / f"{name}.nii", ramp(SHAPE))
        write_nifti(tmp_path / "plain" / "labels" / f"{name}.nii.gz", blocks(SHAPE))
        series(tmp_path / "folders" / name / "image", ramp((5, 7, 4)))
        write_nifti(tmp_path / "folders" / name / "label.nii.gz", blocks(SHAPE))
    for cases in (numbered, found(tmp_path / "plain"), found(tmp_path / "folders")):
        assert [case.patient for case in cases] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("case,patient\na,p7\nb,p8\n", "a case has no patient"),
        ("case,patient\na,p7\nb,p8\nc,\n", "a case has no patient"),
        ("name,patient\na,p7\n", "cannot read"),
        ("case,patient\na\nb,p8\nc,p9\n", "cannot read"),
        ("case,patient,part\na,p7,test\nb,p8,train\nc,p7,train\n", "in both parts"),
        ("case,patient,part\na,p7,test\nb,p8,train\nc,p9,valid\n", "neither train nor test"),
    ],
)
def test_a_wrong_patients_csv_is_refused(tmp_path, table, text):
    with pytest.raises(ConfigError, match=text):
        three(tmp_path, table)


def test_about_a_quarter_tests_and_the_choice_never_changes():
    chosen = [is_test(f"task/case_{i}".encode()) for i in range(2000)]
    assert 430 < sum(chosen) < 570
    written_down = "000010001000001100110011"  # a change would move patients from train to test
    assert "".join(str(int(c)) for c in chosen[:24]) == written_down


def made(count):
    names = [f"task/case_{i:03d}".encode() for i in range(count)]
    return [Case(f"c{i}", (), None, name, i % 4 == 0) for i, name in enumerate(names)]


@pytest.mark.parametrize("sites", [1, 2, 4, 8])
def test_made_hospitals_share_no_patient_and_fall_threefold(sites):
    parts = [of_site(made(64), site, sites) for site in range(sites)]
    names = [case.patient for part in parts for case in part]
    assert len(names) == len(set(names)) == 64
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    if sites > 1:
        assert 2 <= sizes[0] / sizes[-1] <= 5
    assert all(any(c.test for c in part) and any(not c.test for c in part) for part in parts)


def test_no_hospital_is_left_without_a_patient_that_tests():
    parts = [of_site(made(32), site, 8) for site in range(8)]
    assert [sum(case.test for case in part) for part in parts] == [1] * 8


def test_hospitals_are_not_made_in_the_order_of_names():
    names = [case.name for case in of_site(made(16), 3, 4)]
    assert names == ["c5", "c8", "c13"]  # written down: a change moves patients between hospitals


def test_more_hospitals_than_patients_are_refused():
    with pytest.raises(ConfigError, match="2 patients test: one for each at least"):
        of_site(made(8), 0, 4)


def test_all_cases_of_a_patient_go_to_one_hospital():
    cases = [c for i, c in enumerate(made(32)) for c in (c, Case(f"again{i}", *vars_of(c)))]
    parts = [of_site(cases, site, 3) for site in range(3)]
    assert sum(map(len, parts)) == 64
    for part in parts:
        assert len({c.patient for c in part}) * 2 == len(part)


def vars_of(case):
    return case.images, case.label, case.patient, case.test


# --- prediction --------------------------------------------------------------------------------


def test_what_to_predict_is_found_in_every_layout(tmp_path):
    one = write_nifti(tmp_path / "one" / "x.nii.gz", ramp(SHAPE))
    assert unlabelled_cases(one, channels=1) == {"x": (one,)}
    assert unlabelled_cases(tmp_path / "one", channels=1) == {"x": (one,)}
    folder = series(tmp_path / "series", ramp((5, 7, 4)))
    assert unlabelled_cases(folder, channels=1) == {"series": (folder,)}
    inner = series(tmp_path / "many" / "anna" / "image", ramp((5, 7, 4)))
    assert unlabelled_cases(tmp_path / "many", channels=1) == {"anna": (inner,)}
    nnunet(tmp_path / "nn", ["a"], channels=2)
    for c in range(2):
        write_nifti(tmp_path / "nn" / "imagesTs" / f"new_{c:04d}.nii.gz", ramp(SHAPE))
    assert list(unlabelled_cases(tmp_path / "nn", channels=2)) == ["new"]


def test_nothing_to_predict_is_said(tmp_path):
    write_nifti(tmp_path / "x_0000.nii.gz", ramp(SHAPE))
    for source, channels in ((tmp_path / "no", 1), (tmp_path, 2)):
        with pytest.raises(ConfigError, match="nothing to predict"):
            unlabelled_cases(source, channels=channels)


# --- real data ---------------------------------------------------------------------------------


def test_the_hippocampus_volumes_are_found_and_split():
    cases = find_cases(hippocampus_folder(), channels=1, classes=2)
    assert len(cases) == 64
    assert cases[0].patient == b"hippocampus_001"
    sizes = [
        (sum(not c.test for c in part), sum(c.test for c in part))
        for part in (of_site(cases, site, 4) for site in range(4))
    ]
    assert sizes == [(18, 6), (14, 4), (10, 4), (6, 2)]
