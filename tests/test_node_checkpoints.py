"""Checkpoints, genesis and fold on real files: exact bytes, damage, late deltas."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from consortium import Consortium, some_payload
from safetensors.numpy import save_file

from p2pfed.errors import FactRejected
from p2pfed.gossip.events import Fold
from p2pfed.gossip.fold import ModelState, model_hash
from p2pfed.identity.run import Outer, Run
from p2pfed.node.checkpoints import DiskCheckpoints, read_genesis
from p2pfed.node.directory import file_digest
from p2pfed.node.model import Model
from p2pfed.node.store import Store

HERE = Path(__file__).resolve().parent
SIZE = 40
GENESIS = np.linspace(-1, 1, SIZE, dtype=np.float32)
FEDADAM = Outer("fedadam", 0.05)


def chain(n: int) -> bytes:
    return hashlib.blake2b(bytes([n]), digest_size=32).digest()


def a_state(round_: int, salt: int = 0, moments: int = SIZE) -> ModelState:
    values = np.arange(SIZE, dtype=np.int32) * (round_ + 1) + salt
    return ModelState(round_, values, np.full(moments, 0.1), np.full(moments, 0.2), 0.81, 0.98)


def same(one: ModelState, other: ModelState) -> bool:
    arrays = ("model", "first", "second")
    return (one.round, one.beta1_power, one.beta2_power) == (
        other.round,
        other.beta1_power,
        other.beta2_power,
    ) and all(getattr(one, a).tobytes() == getattr(other, a).tobytes() for a in arrays)


@pytest.fixture
def run() -> Run:
    return Consortium(3).run(outer=FEDADAM)


@pytest.fixture
def checkpoints(tmp_path, run) -> DiskCheckpoints:
    return DiskCheckpoints(tmp_path, run)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


# --- files -------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit_also_in_another_process(tmp_path, run, checkpoints):
    checkpoints.save(a_state(3), chain(3))
    again = DiskCheckpoints(tmp_path, run)
    assert again.chains() == {3: chain(3)}
    assert same(again.load(3), a_state(3))


def test_a_run_with_fedavg_keeps_no_moments(tmp_path, run):
    plain = DiskCheckpoints(tmp_path, replace(run, outer=Outer("fedavg", 1.0)))
    plain.save(a_state(2, moments=0), chain(2))
    assert same(plain.load(2), a_state(2, moments=0))


SAVE = """
import sys
from pathlib import Path
import test_node_checkpoints as t
run = t.Consortium(3).run(outer=t.FEDADAM)
t.DiskCheckpoints(Path(sys.argv[1]), run).save(t.a_state(7), t.chain(7))
"""


@pytest.mark.slow
def test_equal_states_are_equal_files_whatever_the_process_hashes_with(tmp_path):
    files = []
    for seed in ("0", "1", "4242"):
        folder = tmp_path / seed
        folder.mkdir()
        path = f"{HERE.parent}{os.pathsep}{HERE}"
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", SAVE, str(folder)], check=True, env=env)
        files.append((only_file(folder).name, only_file(folder).read_bytes()))
    assert files[0] == files[1] == files[2]


def test_an_offer_names_the_digest_and_the_size_of_the_file_it_is_fetched_as(
    tmp_path, run, checkpoints
):
    for r in (4, 2):
        checkpoints.save(a_state(r), chain(r))
    for held in (checkpoints, DiskCheckpoints(tmp_path, run)):
        offers = held.offers()
        assert [(o.round, o.chain) for o in offers] == [(2, chain(2)), (4, chain(4))]
        for offer in offers:
            path = held.find(offer.digest)
            assert path is not None
            assert (file_digest(path), path.stat().st_size) == (offer.digest, offer.size)
            assert held.place_for(offer) == path
    assert checkpoints.find(chain(9)) is None


def test_a_fetched_checkpoint_is_found_where_it_was_put(tmp_path, run, checkpoints):
    checkpoints.save(a_state(5), chain(5))
    (offer,) = checkpoints.offers()
    there = tmp_path / "joiner"
    there.mkdir()
    joiner = DiskCheckpoints(there, run)
    joiner.place_for(offer).write_bytes(only_file_of(tmp_path).read_bytes())
    assert joiner.offers() == (offer,)
    assert same(joiner.load(5), a_state(5))


def only_file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_a_second_state_of_a_round_replaces_the_first(tmp_path, checkpoints):
    checkpoints.save(a_state(3), chain(3))
    checkpoints.save(a_state(3, salt=1), chain(4))
    assert checkpoints.chains() == {3: chain(4)}
    assert same(checkpoints.load(3), a_state(3, salt=1))
    assert len(list(tmp_path.iterdir())) == 1


def test_prune_leaves_only_what_is_to_be_kept_and_no_rest_of_a_killed_write(tmp_path, checkpoints):
    for r in range(6):
        checkpoints.save(a_state(r), chain(r))
    (tmp_path / "0000000001-half.tmp").write_bytes(b"half a checkpoint")
    checkpoints.prune(frozenset({0, 4, 5, 9}))
    assert checkpoints.chains() == {0: chain(0), 4: chain(4), 5: chain(5)}
    assert [o.round for o in checkpoints.offers()] == [0, 4, 5]
    assert len(list(tmp_path.iterdir())) == 3


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-7],
    "longer": lambda data: data + b"\0",
    "no safetensors": lambda data: b"\xff" * len(data),
    "one bit of the header": lambda data: flip(data, 30),
    "one bit of the model": lambda data: flip(data, len(data) - 3),
    "one bit in the middle": lambda data: flip(data, len(data) - 500),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_dropped_and_never_believed(tmp_path, run, damage, checkpoints):
    checkpoints.save(a_state(3), chain(3))
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again = DiskCheckpoints(tmp_path, run)
    with pytest.raises(FactRejected, match="damaged"):
        again.load(3)
    assert again.chains() == {}
    assert again.offers() == ()
    again.save(a_state(3), chain(3))
    assert same(again.load(3), a_state(3))


def rename_as(folder: Path, path: Path, round_: int, chain_: bytes) -> None:
    """Give a file a name that fits its bytes but not what its metadata says."""
    fields = path.name.split("-")
    fields[0], fields[1] = f"{round_:010d}", chain_.hex()
    path.rename(folder / "-".join(fields))


def test_a_checkpoint_under_the_name_of_another_round_or_chain_is_dropped(tmp_path, checkpoints):
    checkpoints.save(a_state(3), chain(3))
    rename_as(tmp_path, only_file(tmp_path), 4, chain(3))
    with pytest.raises(FactRejected):
        checkpoints.load(4)
    checkpoints.save(a_state(3), chain(3))
    rename_as(tmp_path, only_file(tmp_path), 3, chain(8))
    with pytest.raises(FactRejected):
        checkpoints.load(3)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_a_run_of_another_size_is_dropped(tmp_path, run, checkpoints):
    checkpoints.save(a_state(3), chain(3))
    smaller = DiskCheckpoints(tmp_path, replace(run, num_parameters=SIZE - 1))
    with pytest.raises(FactRejected):
        smaller.load(3)


def test_moments_that_are_not_finite_are_never_loaded(tmp_path, checkpoints):
    state = a_state(3)
    state.second[7] = np.nan
    checkpoints.save(state, chain(3))
    with pytest.raises(FactRejected):
        checkpoints.load(3)


def test_a_mean_of_squares_that_is_negative_is_never_loaded(tmp_path, checkpoints):
    state = a_state(3)
    state.second[7] = -1e-300
    checkpoints.save(state, chain(3))
    with pytest.raises(FactRejected):
        checkpoints.load(3)


@pytest.mark.parametrize("name", ["fedyogi", "fedadagrad"])
def test_every_adaptive_optimiser_keeps_its_moments(tmp_path, run, name):
    held = DiskCheckpoints(tmp_path, replace(run, outer=Outer(name, 0.1)))
    held.save(a_state(2), chain(2))
    assert same(held.load(2), a_state(2))


@pytest.mark.parametrize(
    "said",
    [
        {"beta1_power": "0x1p99999"},
        {"beta1_power": "nan"},
        {"beta2_power": "inf"},
        {"beta2_power": "-0x1p-3"},
        "[" * 20_000,
    ],
)
def test_what_a_peer_writes_into_a_checkpoint_is_never_more_than_a_fact_rejected(
    tmp_path, checkpoints, said
):
    good = {"round": 3, "chain": chain(3).hex(), "beta1_power": "0x1p-1", "beta2_power": "0x1p-1"}
    text = said if isinstance(said, str) else json.dumps(good | said)
    state = a_state(3)
    tensors = {"model": state.model, "first": state.first, "second": state.second}
    aside = tmp_path / "aside"
    save_file(tensors, aside, {"p2pfed": text})
    name = f"{3:010d}-{chain(3).hex()}-{file_digest(aside).hex()}.safetensors"
    aside.rename(tmp_path / name)
    with pytest.raises(FactRejected):
        checkpoints.load(3)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_gone_is_a_fact_rejected_and_no_surprise(tmp_path, checkpoints):
    with pytest.raises(FactRejected):
        checkpoints.load(3)


def test_foreign_files_in_the_folder_are_left_alone(tmp_path, checkpoints):
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.save(a_state(3), chain(3))
    checkpoints.prune(frozenset())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# --- the genesis -------------------------------------------------------------------------------


def genesis_file(
    folder: Path, vector: np.ndarray, run: Run, key: str = "model"
) -> tuple[Path, Run]:
    """A file and a run that names it."""
    path = folder / "genesis.safetensors"
    save_file({key: vector}, path)
    return path, replace(run, genesis=file_digest(path))


def test_the_genesis_of_the_run_is_read(tmp_path, run):
    path, named = genesis_file(tmp_path, GENESIS, run)
    assert np.array_equal(read_genesis(path, named), GENESIS)


@pytest.mark.parametrize(
    ("vector", "key"),
    [
        (np.zeros(SIZE + 1, np.float32), "model"),
        (np.zeros((1, SIZE), np.float32), "model"),
        (np.zeros(SIZE, np.float64), "model"),
        (np.full(SIZE, np.nan, np.float32), "model"),
        (np.full(SIZE, np.inf, np.float32), "model"),
        (np.full(SIZE, 1e30, np.float32), "model"),
        (np.zeros(SIZE, np.float32), "weights"),
    ],
    ids=["longer", "2-d", "float64", "NaN", "infinity", "off the grid", "another name"],
)
def test_a_genesis_that_does_not_fit_the_run_is_refused_with_words(tmp_path, run, vector, key):
    path, named = genesis_file(tmp_path, vector, run, key)
    with pytest.raises(FactRejected):
        read_genesis(path, named)


def test_a_file_of_another_hash_is_not_the_genesis(tmp_path, run):
    path, named = genesis_file(tmp_path, GENESIS, run)
    path.write_bytes(flip(path.read_bytes(), 120))
    with pytest.raises(FactRejected, match="not the genesis"):
        read_genesis(path, named)


def test_a_file_that_is_no_safetensors_is_refused_even_under_the_right_hash(tmp_path, run):
    path = tmp_path / "genesis"
    path.write_bytes(b"\x10" * 64)
    with pytest.raises(FactRejected):
        read_genesis(path, replace(run, genesis=file_digest(path)))


# --- the fold ----------------------------------------------------------------------------------


class Hospital:
    """One node's fold on real files."""

    def __init__(self, folder: Path, consortium: Consortium) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.consortium = consortium
        genesis, self.run = genesis_file(
            folder, GENESIS, consortium.run_draft(outer=FEDADAM, robust="clip-median")
        )
        self.run = Run.decode(self.run.encode())
        self.genesis = genesis
        self.store = Store(folder / "store.db")
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.facts = consortium.facts(self.run)
        for signed in self.store.headers(self.run.run_id):
            self.facts.add(signed)
        self.start()

    def start(self) -> None:
        self.checkpoints = DiskCheckpoints(self.folder / "checkpoints", self.run)
        view = self.folder / "view.safetensors"
        self.model = Model(self.run, self.genesis, self.checkpoints, self.store, view)

    def hold(self, round_: int, i: int) -> None:
        delta = self.consortium.delta(self.run, round_, i)
        self.store.keep_delta(delta, durable=False)
        self.facts.add(delta.signed)

    def fold(self, round_: int) -> bytes:
        wanted = Fold(
            round_,
            tuple(self.facts.chain(r) for r in range(round_ + 1)),
            tuple(self.facts.counted(r) for r in range(round_)),
        )
        folded = self.model.fold(wanted)
        assert (folded.round, folded.chain) == (round_, wanted.chains[round_])
        return folded.model_hash


@pytest.fixture
def hospital(tmp_path):
    made: list[Hospital] = []

    def make(name: str = "a") -> Hospital:
        made.append(Hospital(tmp_path / name, Consortium(3)))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


def hold_all(
    hospital: Hospital, rounds: int, but: frozenset[tuple[int, int]] = frozenset()
) -> None:
    for r in range(rounds):
        for i in range(3):
            if (r, i) not in but:
                hospital.hold(r, i)


def test_a_late_delta_gives_the_hash_that_it_gives_on_time(hospital):
    on_time, late = hospital("a"), hospital("b")
    hold_all(on_time, 9)
    expected = on_time.fold(9)
    missing = frozenset({(0, 1), (3, 2), (7, 0)})
    hold_all(late, 9, but=missing)
    without = late.fold(9)
    assert without != expected
    for round_, i in sorted(missing, reverse=True):
        late.hold(round_, i)
        late.fold(9)
    assert late.fold(9) == expected


def test_round_by_round_and_all_at_once_and_after_a_restart_give_one_hash(hospital):
    steady, sudden = hospital("a"), hospital("b")
    hold_all(steady, 8)
    for r in range(9):
        by_steps = steady.fold(r)
    hold_all(sudden, 8)
    assert sudden.fold(8) == by_steps
    steady.start()
    assert steady.fold(8) == by_steps


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_folded_again_to_the_same_hash(hospital, damage):
    node = hospital()
    hold_all(node, 8)
    expected = node.fold(7)
    for path in (node.folder / "checkpoints").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    node.start()
    hash_of_8 = node.fold(8)
    other = hospital("other")
    hold_all(other, 8)
    assert (other.fold(7), other.fold(8)) == (expected, hash_of_8)


def test_a_restart_goes_on_from_a_checkpoint_and_reads_no_payload_from_before_it(
    hospital, monkeypatch
):
    node = hospital()
    hold_all(node, 8)
    node.fold(7)
    node.start()
    read: list[bytes] = []
    payload = node.store.payload
    monkeypatch.setattr(node.store, "payload", lambda fact: read.append(fact) or payload(fact))
    node.fold(8)
    assert sorted(set(read)) == sorted(c.fact for c in node.facts.counted(7))


def test_the_view_for_the_trainer_is_the_folded_model_in_float32(hospital):
    node = hospital()
    hold_all(node, 3)
    node.fold(3)
    from p2pfed.training.vector import read_vector

    view = read_vector(node.folder / "view.safetensors", SIZE)
    state = node.checkpoints.load(3)
    assert np.array_equal(view, state.model.astype(np.float64) * 2.0**-node.run.grid_bits)
    assert model_hash(state) == node.fold(3)


def test_a_wrong_genesis_is_refused_before_any_fold(hospital):
    node = hospital()
    node.genesis.write_bytes(flip(node.genesis.read_bytes(), 120))
    with pytest.raises(FactRejected, match="not the genesis"):
        node.start()


def test_a_genesis_that_is_damaged_later_ends_the_fold_instead_of_repeating_it_for_ever(hospital):
    node = hospital()
    hold_all(node, 3)
    node.genesis.write_bytes(flip(node.genesis.read_bytes(), 120))
    with pytest.raises(FactRejected, match="not the genesis"):
        node.fold(3)


def test_two_payloads_of_one_round_never_reach_the_fold(hospital):
    """The contradicting delta is a proof; its origin is out from that round on."""
    node, other = hospital("a"), hospital("b")
    hold_all(node, 4)
    hold_all(other, 4, but=frozenset((r, 1) for r in range(2, 4)))
    second = node.consortium.delta(node.run, 2, 1, some_payload(node.run, 2, 1, salt=9))
    proof = node.facts.add(second.signed)
    assert proof is not None
    node.facts.add_proof(proof)
    assert node.fold(4) == other.fold(4)
