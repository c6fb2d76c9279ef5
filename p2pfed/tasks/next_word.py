"""Next word of clinical notes at many small clinics: a third kind of task, neither table nor image.

The notes are made by the grammar below, from a seed; no text of anybody is in them. A patient has
one complaint of one specialty and four sentences about it. In each specialty a symptom goes with a
finding, a drug and its dose, which a model has to learn from notes. A clinic sees mostly one
specialty, has habits of its own in what it writes, and has 3 to 8 patients to train on: too
few to learn the language alone. Words, specialties and habits are public; the vocabulary is a
constant, not taken from any hospital's notes.

`train.options.site` is the clinic, 0..1023. Records are sentences: x holds the words from `<start>`
on, y the word that follows each, both (N, T) int64; after the end comes padding, which no loss and
no metric counts.

Model: one block of a transformer (Vaswani et al. 2017, arXiv:1706.03762) with tied embeddings, from
operations that torch vectorises over patients, which its GRU is not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from p2pfed.tasks.sites import site_number
from p2pfed.training.task import HyperParameters, Options, Split, Task, TaskData

__all__ = ["LENGTH", "VOCABULARY", "NextWord"]

MOST_SITES = 1024
LENGTH = 9  # T, words of the longest sentence and its end
SENTENCES = 4  # per patient
WIDTH, HEADS = 48, 2
_TESTED = 20  # patients of each clinic that do not train
_FAVOURITE = 0.5  # of a clinic's patients are of its own specialty
_USUAL = 0.85  # chance that a symptom has its usual finding and drug


@dataclass(frozen=True, slots=True)
class _Specialty:
    """Its words; a symptom's place is that of what goes with it."""

    symptoms: tuple[str, ...]
    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    exams: tuple[str, ...]


def _specialty(symptoms: str, findings: str, drugs: str, exams: str) -> _Specialty:
    split = (tuple(words.split()) for words in (symptoms, findings, drugs, exams))
    return _Specialty(*split)


_SPECIALTIES = (
    _specialty(
        "angina palpitations oedema syncope",
        "murmur tachycardia hypertension bradycardia",
        "aspirin bisoprolol furosemide amlodipine",
        "ecg echo",
    ),
    _specialty(
        "cough wheeze dyspnoea sputum",
        "crackles rhonchi hypoxia effusion",
        "amoxicillin salbutamol tiotropium prednisolone",
        "spirometry radiograph",
    ),
    _specialty(
        "backache stiffness limp numbness",
        "spasm swelling fracture deformity",
        "ibuprofen naproxen paracetamol codeine",
        "palpation film",
    ),
    _specialty(
        "nausea heartburn diarrhoea constipation",
        "tenderness ulcer distension hernia",
        "ondansetron omeprazole loperamide senna",
        "ultrasound endoscopy",
    ),
    _specialty(
        "headache vertigo tremor seizure",
        "photophobia nystagmus rigidity weakness",
        "sumatriptan betahistine levodopa valproate",
        "reflexes tomography",
    ),
    _specialty(
        "itch rash blister flushing",
        "urticaria eczema vesicles erythema",
        "cetirizine hydrocortisone aciclovir emollient",
        "inspection biopsy",
    ),
)
_NUMBERS = ("two", "three", "four", "five")
_UNITS = ("days", "weeks", "months")
_DEGREES = ("mild", "moderate", "severe", "worsening")
_DOSES = ("low-dose", "standard-dose", "high-dose")
_TIMES = ("once", "twice")
_REPORTERS = ("patient", "she", "he")
_PAD, _START, _END = "<pad>", "<start>", "<end>"
_GRAMMAR = (
    "reports has since for denies no on shows likely with started increased daily review in if"
    " persists"
)
VOCABULARY: tuple[str, ...] = (
    _PAD,
    _START,
    _END,
    *_GRAMMAR.split(),
    *(*_NUMBERS, *_UNITS, *_DEGREES, *_DOSES, *_TIMES, *_REPORTERS),
    *(w for s in _SPECIALTIES for w in (*s.symptoms, *s.findings, *s.drugs, *s.exams)),
)
_NUMBER_OF = {word: number for number, word in enumerate(VOCABULARY)}
_PADDING = _NUMBER_OF[_PAD]


class NextWord(Task):
    """See the module docstring; option `site` (0..1023, default 0)."""

    name: ClassVar[str] = "next-word"
    monitor: ClassVar[str] = "top1"
    larger_is_better: ClassVar[bool] = True
    hyper: ClassVar[HyperParameters] = HyperParameters(
        local_steps=10, batch_size=16, learning_rate=0.2, optimizer="momentum"
    )

    def model(self) -> nn.Module:
        """Words (N, T) to scores of every next word (N, T, vocabulary)."""
        return _Transformer()

    def data(self, folder: Path | None, options: Options) -> TaskData[Split]:  # noqa: ARG002 - none
        """One clinic's patients; see `Task.data`."""
        clinic = _Clinic(site_number(options, MOST_SITES))
        return TaskData(
            train=clinic.patients("train", clinic.size), test=clinic.patients("test", _TESTED)
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy over the words of each sentence, shape (N,).

        Args:
            output: Shape (N, T, vocabulary).
            target: Shape (N, T); padding does not count.
        """
        each = cross_entropy(
            output.transpose(1, 2), target, reduction="none", ignore_index=_PADDING
        )
        return each.sum(-1) / (target != _PADDING).sum(-1).clamp(min=1)

    def metrics(self, model: nn.Module, patients: Split) -> dict[str, float]:
        """Share of words that are the likeliest and among the three likeliest, and perplexity."""
        with torch.no_grad():
            output = model(patients.x)
        counts = patients.y != _PADDING
        scores, words = output[counts], patients.y[counts]
        likeliest = scores.topk(3).indices == words[:, None]
        return {
            "top1": float(likeliest[:, 0].float().mean()),
            "top3": float(likeliest.any(1).float().mean()),
            "perplexity": math.exp(min(float(cross_entropy(scores, words)), 50.0)),
        }


class _Transformer(nn.Module):
    """Each place sees itself and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.first, self.second, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.looking = nn.Linear(WIDTH, 3 * WIDTH)
        self.seen = nn.Linear(WIDTH, WIDTH)
        self.thought = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        h = h + self._attention(self.first(h))
        h = h + self.thought(self.second(h))
        output: Tensor = self.last(h) @ self.words.weight.T
        return output

    def _attention(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        parts = self.looking(h).reshape(n, t, 3, HEADS, width // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width of a head)
        scores = query @ key.transpose(-1, -2) / (width // HEADS) ** 0.5
        future = torch.ones(t, t, dtype=torch.bool, device=h.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        output: Tensor = self.seen((weights @ value).transpose(1, 2).reshape(n, t, width))
        return output


# --- the grammar ---------------------------------------------------------------------------------


class _Clinic:
    """One clinic's habits, and the notes it writes."""

    def __init__(self, site: int) -> None:
        self._site = site
        habits = random.Random(f"next-word/{site}")  # noqa: S311 - made-up notes, no secret
        self.size = habits.randint(3, 8)
        self._own = habits.randrange(len(_SPECIALTIES))
        self._reporter = habits.choice(_REPORTERS)
        self._verb = habits.choice(("reports", "has"))
        self._number, self._unit = habits.choice(_NUMBERS), habits.choice(_UNITS)  # until a review

    def patients(self, part: str, count: int) -> Split:
        """Notes of patients whom nobody else has."""
        x, y = [], []
        for patient in range(count):
            chance = random.Random(f"next-word/{self._site}/{part}/{patient}")  # noqa: S311
            for words in self._note(chance):
                padding = (_PAD,) * (LENGTH - 1 - len(words))
                x.append([_NUMBER_OF[word] for word in (_START, *words, *padding)])
                y.append([_NUMBER_OF[word] for word in (*words, _END, *padding)])
        return Split(
            torch.tensor(x),
            torch.tensor(y),
            torch.arange(count).repeat_interleave(SENTENCES),
            tuple(f"next-word/{self._site}/{part}/{patient}".encode() for patient in range(count)),
        )

    def _note(self, chance: random.Random) -> list[list[str]]:
        """One patient's sentences."""
        own = chance.random() < _FAVOURITE
        specialty = _SPECIALTIES[self._own] if own else chance.choice(_SPECIALTIES)
        place = chance.randrange(len(specialty.symptoms))
        symptom = specialty.symptoms[place]

        def usual(words: tuple[str, ...]) -> str:
            return words[place] if chance.random() < _USUAL else chance.choice(words)

        finding, drug = usual(specialty.findings), usual(specialty.drugs)
        degree = chance.choice(_DEGREES)
        kinds: list[Callable[[], list[str]]] = [
            lambda: [
                *(self._reporter, self._verb, degree, symptom, "since"),
                *(chance.choice(_NUMBERS), chance.choice(_UNITS)),
            ],
            lambda: [specialty.exams[place % 2], "shows", finding, "likely", "with", symptom],
            lambda: [
                *("started", drug, _DOSES[place % 3], _TIMES[place // 2], "daily", "for", symptom)
            ],
            lambda: [
                *("no", chance.choice(specialty.findings), "on", specialty.exams[1 - place % 2]),
                *("denies", chance.choice(specialty.symptoms)),
            ],
            lambda: [
                *("review", "in", self._number, self._unit, "if", symptom, "persists"),
            ],
            lambda: ["increased", drug, "for", degree, symptom, "with", finding],
        ]
        return [kind() for kind in chance.sample(kinds, SENTENCES)]
