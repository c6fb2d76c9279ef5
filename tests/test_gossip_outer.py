"""Outer optimisers: against textbook formulas in exact or plain numbers, at their edges."""

from __future__ import annotations

import ctypes
import math
import platform

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfed.gossip.outer import OuterStep, check_arithmetic
from p2pfed.identity.rules import MIN_EPSILON, Outer

ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
MEANS = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=8)


def steps_of(outer: Outer, means: list[float]) -> list[float]:
    """The steps of one coordinate, given its mean deltas."""
    first, second, power1, power2, steps = np.zeros(1), np.zeros(1), 1.0, 1.0, []
    for mean in means:
        power1, power2 = power1 * outer.beta1, power2 * outer.beta2
        value = np.array([mean])
        OuterStep.after(outer, power1, power2).take(value, first, second, np.empty(1))
        steps.append(float(value[0]))
    return steps


def published(outer: Outer, means: list[float]) -> list[float]:
    """Reddi et al. 2021, Algorithm 2, and Kingma and Ba 2015, Algorithm 1, as they are printed."""
    m = v = 0.0
    steps = []
    for t, g in enumerate(means, start=1):
        m = outer.beta1 * m + (1 - outer.beta1) * g
        if outer.name == "fedadagrad":
            v = v + g * g
        elif outer.name == "fedyogi":
            v = v - (1 - outer.beta2) * g * g * math.copysign(v != g * g, v - g * g)
        else:
            v = outer.beta2 * v + (1 - outer.beta2) * g * g
        corrected = outer.bias_correction and outer.name != "fedadagrad"
        m_hat = m / (1 - outer.beta1**t) if corrected else m
        v_hat = v / (1 - outer.beta2**t) if corrected else v
        steps.append(outer.learning_rate * m_hat / (math.sqrt(v_hat) + outer.epsilon))
    return steps


@settings(max_examples=60)
@given(st.sampled_from(ADAPTIVE), st.booleans(), st.sampled_from([0.0, 0.9]), MEANS)
def test_adaptive_optimisers_are_the_published_ones(name, corrected, beta1, means):
    outer = Outer(name, 0.03, beta1=beta1, bias_correction=corrected)
    assert steps_of(outer, means) == pytest.approx(published(outer, means), rel=1e-9, abs=1e-12)


@given(MEANS)
def test_fedavg_is_the_mean_times_the_learning_rate(means):
    assert steps_of(Outer("fedavg", 0.25), means) == [0.25 * mean for mean in means]


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_the_first_corrected_step_is_one_learning_rate_whatever_the_scale(name):
    for mean in (1e-3, 1.0, 1e3):
        outer = Outer(name, 0.03, epsilon=MIN_EPSILON)
        assert steps_of(outer, [mean]) == pytest.approx([0.03], rel=1e-6)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_coordinate_that_nobody_touched_does_not_move(name):
    outer = Outer(name, 1000.0, beta1=0.0, beta2=0.0, epsilon=MIN_EPSILON)
    assert steps_of(outer, [0.0] * 5) == [0.0] * 5


@given(MEANS)
def test_yogi_never_makes_a_square_negative(means):
    outer = Outer("fedyogi", 1.0, beta2=0.0)
    first, second = np.zeros(1), np.zeros(1)
    for mean in means:
        OuterStep.after(outer, 0.5, 0.5).take(np.array([mean]), first, second, np.empty(1))
        assert second[0] >= 0


@given(MEANS, st.integers(4, 24))
def test_a_step_in_grid_units_is_the_step_times_a_power_of_two(means, grid_bits):
    outer = Outer("fedadam", 0.03)
    plain = OuterStep.after(outer, 0.9, 0.99)
    on_grid = OuterStep.after(outer, 0.9, 0.99, grid_bits=grid_bits)
    one, other = np.array(means), np.array(means)
    plain.take(one, np.zeros(one.size), np.zeros(one.size), np.empty(one.size))
    on_grid.take(other, np.zeros(one.size), np.zeros(one.size), np.empty(one.size))
    assert (one * 2.0**grid_bits).tobytes() == other.tobytes()


def test_normal_arithmetic_is_accepted():
    check_arithmetic()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets the mode of an x86 processor")
def test_a_process_that_flushes_small_numbers_to_zero_is_refused():
    libm = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_uint32 * 8)()  # glibc's fenv_t: the last word is MXCSR
    libm.fegetenv(environment)
    changed = (ctypes.c_uint32 * 8)(*environment)
    changed[7] |= 0x8040  # flush to zero, denormals are zero
    libm.fesetenv(changed)
    try:
        with pytest.raises(RuntimeError, match="flush to zero"):
            check_arithmetic()
    finally:
        libm.fesetenv(environment)
    check_arithmetic()
