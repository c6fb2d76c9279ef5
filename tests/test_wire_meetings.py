"""The messages of pairwise mode: one encoding each, everything else refused."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.errors import RemoteProtocolError
from p2pfed.wire.codec import MAX_FRAME, pack
from p2pfed.wire.meetings import Abort, Accept, Busy, Commit, Done, Propose, Status
from p2pfed.wire.messages import decode_message, encode_message

RUN, EXCHANGE, TICKET = b"r" * 32, b"e" * 16, b"t" * 16
ONE_OF_EACH = [
    Propose(RUN, EXCHANGE, b"o" * 32),
    Accept(RUN, EXCHANGE, TICKET, b"\x03vector"),
    Busy(RUN, EXCHANGE),
    Commit(RUN, TICKET, b"\x04step"),
    Done(RUN, TICKET),
    Abort(RUN, TICKET),
    Status(RUN, EXCHANGE, TICKET),
]
H16 = st.binary(min_size=16, max_size=16)
H32 = st.binary(min_size=32, max_size=32)
VECTORS = st.binary(max_size=60)
MESSAGES = st.one_of(
    st.builds(Propose, H32, H16, H32),
    st.builds(Accept, H32, H16, H16, VECTORS),
    st.builds(Busy, H32, H16),
    st.builds(Commit, H32, H16, VECTORS),
    st.builds(Done, H32, H16),
    st.builds(Abort, H32, H16),
    st.builds(Status, H32, H16, H16),
)


@settings(max_examples=40)
@given(MESSAGES)
def test_decode_of_encode_is_the_message_itself(message):
    assert decode_message(encode_message(message)) == message


def test_the_bytes_of_the_messages_have_not_changed():
    """If this fails on purpose, the protocol's version must change with it."""
    run = "c420" + "72" * 32
    exchange, ticket, roster = "c410" + "65" * 16, "c410" + "74" * 16, "c420" + "6f" * 32
    assert [encode_message(m).hex() for m in ONE_OF_EACH] == [
        "94a7" + b"propose".hex() + run + exchange + roster,
        "95a6" + b"accept".hex() + run + exchange + ticket + "c407" + b"\x03vector".hex(),
        "93a4" + b"busy".hex() + run + exchange,
        "94a6" + b"commit".hex() + run + ticket + "c405" + b"\x04step".hex(),
        "93a4" + b"done".hex() + run + ticket,
        "93a5" + b"abort".hex() + run + ticket,
        "94a6" + b"status".hex() + run + exchange + ticket,
    ]


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda m: type(m).__name__)
def test_what_is_cut_too_long_or_of_another_type_is_refused(message):
    frame = encode_message(message)
    items = msgpack.unpackb(frame, use_list=False)
    spoiled = [frame[:length] for length in range(len(frame))]
    spoiled += [pack(*items, b""), pack(*items[:-1])]
    for at, was in enumerate(items):
        for wrong in (None, True, 5, "x\n", b"x" * 15, (b"x",)):
            if type(wrong) is type(was) and was in {b"\x03vector", b"\x04step"}:
                continue  # any bytes are a vector until somebody who knows the run looks
            spoiled.append(pack(*items[:at], wrong, *items[at + 1 :]))
    for frame_ in spoiled:
        with pytest.raises(RemoteProtocolError):
            decode_message(frame_)


def test_a_vector_that_fits_no_frame_is_never_sent():
    with pytest.raises(ValueError, match="Accept"):
        encode_message(Accept(RUN, EXCHANGE, TICKET, bytes(MAX_FRAME)))
