"""Next word: made-up notes, a causal model, and one vectorised contribution per patient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from p2pfed.errors import ConfigError
from p2pfed.tasks.next_word import LENGTH, VOCABULARY, NextWord
from p2pfed.training.contributions import PatientContributions
from p2pfed.training.local import evaluate, initial_vector, train_local
from p2pfed.training.task import load_task
from p2pfed.training.watch import Watch

PAD, START, END = (VOCABULARY.index(word) for word in ("<pad>", "<start>", "<end>"))


@pytest.fixture
def task():
    return load_task("next-word", {"site": 3})


@pytest.fixture
def data(task):
    return task.data(None, task.options)


def sentences(split):
    for x, y in zip(split.x.tolist(), split.y.tolist(), strict=True):
        yield [n for n in x if n != PAD], [n for n in y if n != PAD]


def test_y_is_x_one_word_later_and_ends_with_the_end(data):
    for x, y in sentences(data.train):
        assert x[0] == START
        assert x[1:] == y[:-1]
        assert y[-1] == END
        assert 6 < len(x) <= LENGTH


def test_a_word_has_one_number():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert PAD == 0


@pytest.mark.slow
def test_every_word_of_the_vocabulary_is_written_by_some_clinic():
    used = {0}
    for site in range(60):
        split = NextWord().data(None, {"site": site}).test
        used |= set(split.x.unique().tolist()) | set(split.y.unique().tolist())
    assert {VOCABULARY[n] for n in set(range(len(VOCABULARY))) - used} == set()


def test_a_patient_has_four_sentences_and_clinics_have_few_patients(data):
    for site in range(20):
        train = NextWord().data(None, {"site": site}).train
        assert 3 <= train.num_patients <= 8
        assert torch.equal(train.patient.bincount(), torch.full((train.num_patients,), 4))
    assert not set(data.train.patient_ids) & set(data.test.patient_ids)


def test_the_notes_are_the_same_every_time_and_others_at_another_clinic(task, data):
    again = task.data(None, {"site": 3})
    assert torch.equal(again.train.x, data.train.x)
    assert not torch.equal(task.data(None, {"site": 4}).test.x, data.test.x)


def test_no_word_looks_ahead(task, data):
    model = task.model().eval()
    x = data.test.x[:1].clone()
    before = model(x)
    x[0, 5:] = VOCABULARY.index("ecg")
    after = model(x)
    assert torch.allclose(before[0, :5], after[0, :5], atol=1e-6)
    assert not torch.allclose(before[0, 5], after[0, 5], atol=1e-3)


def test_padding_does_not_count(task, data):
    model = task.model().eval()
    short = data.test.x[:1], data.test.y[:1]
    words = int((short[1] != PAD).sum())
    cut = short[0][:, :words], short[1][:, :words]
    whole, alone = (task.loss(model(x), y).item() for x, y in (short, cut))
    assert whole == pytest.approx(alone, rel=1e-5)
    nothing = task.loss(model(short[0]), torch.zeros_like(short[1]))
    assert nothing.item() == 0.0


@pytest.mark.slow
def test_one_contribution_per_patient_is_vectorised_and_right(task, data):
    vector, watch = initial_vector(task, seed=0), Watch()
    together = np.concatenate(
        list(PatientContributions(task, vector, data.train, watch=watch).chunks())
    )
    one_by_one = PatientContributions(task, vector, data.train, chunk_bytes=1)
    rows = np.concatenate(list(one_by_one.chunks()))
    assert rows.shape == (data.train.num_patients, vector.size)
    assert np.allclose(together, rows, atol=1e-5)
    notes = " ".join(watch.notes)
    assert "one by one" not in notes
    assert 20_000 < vector.size < 60_000


def test_metrics_are_those_of_a_model_that_knows_and_of_one_that_guesses(task, data):
    class Knows(torch.nn.Module):
        def forward(self, x):
            return 9.0 * torch.nn.functional.one_hot(data.test.y, len(VOCABULARY)).float()

    class Guesses(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, len(VOCABULARY))

    best = task.metrics(Knows(), data.test)
    assert best["top1"] == best["top3"] == 1.0
    assert best["perplexity"] == pytest.approx(1.0, abs=0.05)
    blind = task.metrics(Guesses(), data.test)
    assert blind["perplexity"] == pytest.approx(len(VOCABULARY), rel=1e-4)
    assert blind["top3"] < 0.2


def test_the_loss_is_one_value_per_sentence_and_bears_infinity(task, data):
    output = torch.full((2, LENGTH, len(VOCABULARY)), math.inf)
    assert task.loss(output, data.test.y[:2]).shape == (2,)


@pytest.mark.slow
def test_a_clinic_learns_to_write_as_it_does(task, data):
    start = initial_vector(task, seed=0)
    trained = train_local(task, data.train, start, steps=60, seed=0)
    assert evaluate(task, trained.vector, data.test)["top1"] > 0.35
    assert evaluate(task, start, data.test)["top1"] < 0.1


@pytest.mark.parametrize("site", [-1, 1024, "0", 0.0])
def test_a_clinic_that_does_not_exist_is_refused(site):
    with pytest.raises(ConfigError, match=r"train\.options\.site"):
        NextWord().data(None, {"site": site})
