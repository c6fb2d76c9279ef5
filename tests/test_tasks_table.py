"""A CSV file becomes patients, by rows and public constants alone."""

from __future__ import annotations

import pytest
import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.sites import is_test
from p2pfed.tasks.table import read_table

FEATURES = {"age": (60, 10), "size": (20, 5)}
HEAD = "patient,age,size,label\n"
BODY = "".join(f"R-{n},{50 + n},{20 - n},{n % 2}\n" for n in range(12)) + "R-3,99,5,1\n"


def table(folder, text=HEAD + BODY):
    (folder / "patients.csv").write_text(text, "utf-8")
    return folder


def test_every_patient_is_in_one_part_with_all_rows(tmp_path):
    data = read_table(table(tmp_path), FEATURES)
    names = [*data.train.patient_ids, *data.test.patient_ids]
    assert sorted(names) == sorted(f"R-{n}".encode() for n in range(12))
    assert len(data.train.x) + len(data.test.x) == 13
    for split, tests in ((data.train, False), (data.test, True)):
        assert all(is_test(name) == tests for name in split.patient_ids)
    part = data.test if is_test(b"R-3") else data.train
    rows = part.records_of[part.patient_ids.index(b"R-3")]
    assert torch.allclose(part.x[rows], torch.tensor([[-0.7, -0.6], [3.9, -3.0]]))
    assert part.y[rows].tolist() == [1, 1]


def test_no_patient_moves_another_ones_record(tmp_path):
    before = read_table(table(tmp_path), FEATURES)
    after = read_table(table(tmp_path, HEAD + BODY + "R-77,1000,0,1\n"), FEATURES)
    for old, new in ((before.train, after.train), (before.test, after.test)):
        kept = [n for n, name in enumerate(new.patient_ids) if name != b"R-77"]
        assert torch.equal(old.x, new.subset(kept).x)


def test_about_a_fourth_tests():
    assert 0.2 < sum(is_test(f"R-{n}".encode()) for n in range(2000)) / 2000 < 0.3


def test_the_file_itself_may_be_named_and_other_columns_do_not_matter(tmp_path):
    text = "\ufeffnote,size,age,ill,who\n" + "".join(f"x,{n},{n},1,P{n}\n" for n in range(12))
    folder = table(tmp_path, text)
    data = read_table(folder / "patients.csv", FEATURES, label="ill", patient="who")
    assert data.train.num_patients + data.test.num_patients == 12


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("patient,age,label\nR-1,5,0\n", "no column 'size'"),
        (HEAD + "R-1,12x4,3,0\n", "line 2 of the table holds no number in age"),
        (HEAD + BODY + "R-9,50\n", "line 15 of the table holds no number in size"),
        (HEAD + "R-1,nan,3,0\n", "line 2 of the table holds no number in age"),
        (HEAD + " ,5,3,0\n", "line 2 of the table names no patient"),
        (HEAD, "no patient who trains"),
        (HEAD + "R-1,5,3,0\n", "no patient who t"),
        ("", "no column 'age'"),
    ],
)
def test_a_mistake_is_told_by_its_place_and_never_by_its_value(tmp_path, text, told):
    with pytest.raises(ConfigError) as refused:
        read_table(table(tmp_path, text), FEATURES)
    assert told in refused.value.what
    assert "R-" not in str(refused.value)
    assert "12x4" not in str(refused.value)


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.data is missing"):
        read_table(None, FEATURES)
    with pytest.raises(ConfigError, match=r"cannot read .*patients\.csv"):
        read_table(tmp_path, FEATURES)
    (tmp_path / "patients.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        read_table(tmp_path, FEATURES)
