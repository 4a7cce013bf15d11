"""Pairs of times: in order, with the published shares of s = t, and every density kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture

import fmjax as fm
from fmjax import flow_maps

NUM = 40_000
KEY = jax.random.key(0)


def share(flags):
    return float(np.mean(np.asarray(flags)))


@pytest.mark.parametrize("order", [flow_maps.clip_end, flow_maps.sort_times])
@pytest.mark.parametrize("equal", [0.0, 0.25, 0.75, 1.0])
def test_the_share_of_equal_pairs(order, equal):
    """U[0, 1) twice: half of the pairs come in order, the others are clipped or sorted."""
    pairs = flow_maps.ordered_times(fm.uniform, fm.uniform, equal=equal, order=order)
    t, s = map(np.asarray, jit(lambda key: pairs(key, (NUM,)))(KEY))
    assert (t <= s).all()
    clipped = 0.5 if order is flow_maps.clip_end else 0.0
    want = equal + (1 - equal) * clipped
    assert abs(share(t == s) - want) <= 4 * np.sqrt(want * (1 - want) / NUM)
    # clip_end keeps the density of t; the smaller of two uniform times has the mean 1/3.
    mean, std = (1 / 2, 12**-0.5) if order is flow_maps.clip_end else (1 / 3, 18**-0.5)
    assert abs(float(t.mean()) - mean) < 4 * std / np.sqrt(NUM)


def test_the_released_pairs_are_equal_three_times_in_ten():
    """P(s < t) for the logits' difference N(3.4, 2 * 1.6^2) is 0.066; 0.25 + 0.75 * 0.066."""
    pairs = flow_maps.ordered_times(
        fm.logit_normal(0.6, 1.6), fm.logit_normal(4.0, 1.6), equal=0.25
    )
    t, s = jit(lambda key: pairs(key, (NUM,)))(KEY)
    assert abs(share(t == s) - 0.2998) < 4 * np.sqrt(0.3 * 0.7 / NUM)


def test_equal_may_be_traced_and_a_share_is_drawn_example_by_example():
    def draw(equal):
        return flow_maps.ordered_times(fm.uniform, fm.uniform, equal=equal)(KEY, (64, 2))

    t, s = jit(draw)(0.5)
    np.testing.assert_array_equal(s, jit(lambda: draw(0.5))().s)
    assert t.shape == (64, 2) and 0 < share(t == s) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equal": 1.5}, r"equal must be a probability in \[0, 1\]; got 1.5"),
        ({"equal": jnp.zeros(2)}, "equal must be a probability"),
        ({"equal": "half"}, "equal must be a probability"),
        ({"start": 0.5}, r"start must be a sampler \(key, shape\) -> t; got 0.5"),
        ({"order": "sort"}, r"order must be \(start, end\) -> TimePair"),
        ({"order": lambda t, s: None}, r"order must return TimePair\(t, s\); got None"),
        ({"order": lambda t, s: (t[0], s)}, r"order must return .* shape \(4,\)"),
        ({"order": lambda t, s: (t + 1, s)}, "order must return t <= s"),
        ({"end": lambda key, shape: jnp.zeros(3)}, r"end must return .* shape \(4,\)"),
    ],
)
def test_errors_name_the_rule_and_what_was_got(change, message):
    arguments = {"start": fm.uniform, "end": fm.uniform, "equal": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        flow_maps.ordered_times(**arguments)(KEY, (4,))
