"""The run file: signed constants, and what people are told before they accept it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from consortium import Consortium, signed
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import FactRejected
from p2pfed.identity.rules import Averaging, Encoding, Outer
from p2pfed.identity.run import Run, check_signed_run
from p2pfed.identity.signing import RUN, fact_hash
from p2pfed.wire.messages import Facts, encode_message
from p2pfed.wire.payload import Payload, decode_payload, max_payload_bytes

NET = Consortium(3)
PRIVATE = {
    "mechanism": "svt",
    "unit": "patient",
    "epsilon": Fraction(3),
    "delta": Fraction(1, 100_000),
    "select_share": Fraction(1, 4),
}


def test_a_run_reads_back_as_it_was_written():
    draft = NET.run_draft(**PRIVATE, outer=Outer("fedadam", 0.03, 0.8, 0.95, 1e-5), quorum=1)
    run = Run.decode(draft.encode())
    assert run == draft
    assert run.run_id == fact_hash(draft.encode())


def test_a_run_is_believed_with_k_signatures_of_stewards():
    assert check_signed_run(NET.signed_run(0, 2), NET.roster).run_id == NET.run().run_id


@pytest.mark.parametrize("by", [(0,), (3, 4), (0, 4)])
def test_a_run_that_too_few_stewards_signed_is_refused(by):
    with pytest.raises(FactRejected, match="not signed by 2"):
        check_signed_run(NET.signed_run(*by), NET.roster)


def test_an_unsigned_run_is_refused():
    with pytest.raises(FactRejected, match="not signed by 2"):
        check_signed_run(NET.run_draft().encode(), NET.roster)


def test_a_run_that_was_altered_after_signing_is_refused():
    altered = NET.signed_run().replace(b'"rounds": 20', b'"rounds": 99')
    with pytest.raises(FactRejected, match="not signed by 2"):
        check_signed_run(altered, NET.roster)


def test_a_run_of_another_network_is_refused():
    theirs = Consortium(3, network="another network")
    with pytest.raises(FactRejected, match="of the network"):
        check_signed_run(theirs.signed_run(), NET.roster)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanism": "svt"},
        {"unit": "patient"},
        {**PRIVATE, "unit": "none"},
        {**PRIVATE, "epsilon": Fraction(0)},
        {**PRIVATE, "delta": Fraction(0)},
        {**PRIVATE, "select_share": Fraction(0)},
        {**PRIVATE, "select_share": Fraction(1)},
        {"epsilon": Fraction(1, 3)},
        {"outer": Outer("fedadam", 0.1, epsilon=0.0)},
        {"outer": Outer("fedadam", 0.1, beta1=1.0)},
        {"outer": Outer("fedadam", 0.1, beta2=1.0)},
        {"num_parameters": 1 << 23},
    ],
)
def test_constants_that_cannot_work_are_refused_when_a_run_is_made(wrong):
    with pytest.raises(FactRejected):
        NET.run_draft(**wrong).encode()


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b'"epsilon": 1e-06', b'"epsilon": 0'),
        (b'"beta1": 0.9', b'"beta1": 1'),
        (b'"beta2": 0.99', b'"beta2": 1.0'),
    ],
)
def test_an_outer_step_that_divides_by_zero_is_refused_when_a_run_is_read(was, becomes):
    """0 / 0 is NaN, and NaN as an integer is not the same number on every machine."""
    payload = NET.run_draft(outer=Outer("fedadam", 0.1)).encode()
    assert was in payload
    with pytest.raises(FactRejected, match="fedadam"):
        check_signed_run(signed(payload.replace(was, becomes), person=RUN), NET.roster)


@pytest.mark.parametrize(
    ("constants", "most"),
    [
        ({"num_parameters": 1000, "top_fraction": Fraction(1)}, 1000),
        ({"num_parameters": 1000, "top_fraction": Fraction("0.0101")}, 11),
        ({"num_parameters": 1000, "top_fraction": Fraction(0)}, 1),
        ({**PRIVATE, "num_parameters": 1000, "block_size": 8, "segment_blocks": 5}, 200),
        ({**PRIVATE, "num_parameters": 1001, "block_size": 8, "segment_blocks": 5}, 208),
        ({**PRIVATE, "num_parameters": 5, "block_size": 8, "segment_blocks": 5}, 5),
        ({**PRIVATE, "mechanism": "gaussian", "num_parameters": 77}, 77),
    ],
)
def test_the_most_coordinates_of_a_delta_follow_from_the_run(constants, most):
    assert NET.run(**constants).max_released == most


def test_leaving_is_true_gaps_that_need_fillers_are_counted():
    """20 million parameters, all released ones at the end: 305 fillers stand before them."""
    run = NET.run(num_parameters=20_000_000, top_fraction=Fraction("0.0001"))
    indices = np.arange(20_000_000 - run.max_released, 20_000_000)
    delta = NET.delta(run, 0, 0, Payload(indices, np.ones(indices.size, np.int16)))
    sent = len(encode_message(Facts((delta.encode(),), (), ())))
    shown = run.leaving(NET.roster)["bytes_per_round"]
    assert sent <= shown <= sent + 100


@pytest.mark.slow
def test_the_longest_delta_that_a_run_allows_fits_into_a_frame():
    run = NET.run(num_parameters=8_388_400)
    payload = Payload.dense(np.ones(8_388_400, np.int16))
    encode_message(Facts((NET.delta(run, 0, 0, payload).encode(),), (), ()))
    with pytest.raises(FactRejected, match="fit into one message"):
        NET.run(num_parameters=8_388_408 + 1)
    low = NET.run(num_parameters=8_388_409, encoding=Encoding("int8"))
    assert low.bytes_per_round == 400 + 8_388_409


@settings(max_examples=20)
@given(
    size=st.one_of(st.integers(1, 40), st.integers(1, 150_000)),
    width=st.sampled_from(["int16", "int8"]),
    share=st.fractions(0, 1, max_denominator=8).map(lambda f: Fraction(str(round(float(f), 3)))),
    data=st.data(),
)
def test_leaving_is_true_no_encoded_delta_is_longer_than_what_was_shown(size, width, share, data):
    """The longest delta: all coordinates that the run allows, as far apart as they can be."""
    run = NET.run(
        num_parameters=size, top_fraction=share, rounds=1_000_000, encoding=Encoding(width)
    )
    most = run.max_released
    spread = np.unique(np.linspace(0, size - 1, most).astype(np.int64))
    late = np.arange(size - most, size)
    indices = data.draw(st.sampled_from([spread, late, np.arange(most)]))
    bounds = {"num_parameters": size, "max_released": most, "width": width}
    delta = NET.delta(
        run,
        run.rounds - 1,
        0,
        Payload(indices, np.full(indices.size, -1, np.int16)),
        spent_nano_rho=(1 << 63) - 1,
        releases=(1 << 63) - 1,
    )
    shown = run.leaving(NET.roster)
    assert len(encode_message(Facts((delta.encode(),), (), ()))) <= shown["bytes_per_round"]
    assert shown["bytes_per_round"] <= 400 + max_payload_bytes(size, most, width)
    again = decode_payload(delta.payload, **bounds)
    assert np.count_nonzero(again.values) == indices.size <= shown["coordinates_per_round"]


def test_leaving_names_everyone_who_receives_and_what_it_costs():
    run = NET.run(**PRIVATE, rounds=10)
    shown = run.leaving(NET.roster)
    assert shown["receivers"] == ["h0", "h1", "h2"]
    assert (shown["epsilon"], shown["rounds"]) == (3.0, 10)
    assert shown["epsilon"] / 10 < shown["epsilon_of_one_round"] < shown["epsilon"]
    assert NET.run().leaving(NET.roster)["epsilon_of_one_round"] == 0


def test_a_run_id_is_no_part_of_what_is_signed():
    draft = NET.run_draft()
    assert replace(draft, run_id=b"x" * 32).encode() == draft.encode()


def test_a_run_without_an_outer_optimiser_is_refused():
    payload = json.loads(NET.run_draft().encode()) | {"outer": []}
    with pytest.raises(FactRejected, match="outer"):
        Run.decode(json.dumps(payload).encode())


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({**PRIVATE, "averaging": Averaging(mode="pairwise")}, "one more look at the patients"),
        ({"averaging": Averaging(mode="pairwise"), "robust": "clip-median"}, "a pair sees two"),
        ({"averaging": Averaging(mode="pairwise"), "outer": Outer("fedadam", 0.1)}, "sees two"),
        ({"averaging": Averaging(mode="pairwise", committee=8)}, "a pair sees two"),
        ({**PRIVATE, "encoding": Encoding(error_feedback=True)}, "is not public"),
        ({**PRIVATE, "averaging": Averaging(drift_correction=True)}, "sparsity ruin that"),
        (
            {"top_fraction": Fraction("0.1"), "averaging": Averaging(drift_correction=True)},
            "sparsity ruin that",
        ),
        ({"averaging": Averaging(weight_power=Fraction("0.3"))}, "whole numbers"),
    ],
)
def test_rules_that_contradict_each_other_are_refused_with_the_reason(wrong, why):
    with pytest.raises(FactRejected, match=why):
        NET.run_draft(**wrong).encode()


def test_all_rules_come_back_from_the_run_file():
    draft = NET.run_draft(
        outer=Outer("fedyogi", 0.01, 0.9, 0.999, 1e-8, bias_correction=False),
        encoding=Encoding("int8", error_feedback=True),
        averaging=Averaging(
            weight_power=Fraction(1, 2),
            sample_cap=Fraction(2),
            committee=16,
            participation_scaling=True,
            hot_rounds=10,
            late_interval_s=60.0,
            exchanges=8,
        ),
        robust="centred-clipping",
    )
    assert Run.decode(draft.encode()) == draft


def test_in_pairs_the_whole_model_leaves_in_every_meeting():
    run = NET.run(num_parameters=10_000, averaging=Averaging(mode="pairwise", exchanges=4))
    told = run.leaving(NET.roster)
    assert told["mode"] == "pairwise"
    assert told["bytes_per_round"] == 8 * run.message_bytes > 8 * 2 * 10_000
    most = {"encoding": Encoding("int8"), "averaging": Averaging(mode="pairwise")}
    with pytest.raises(FactRejected, match="may have"):
        NET.run_draft(num_parameters=(16 << 20) - 1000, **most).encode()
