"""The comparison with the peers: its protocol, its table and its reference, without torch."""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm
from experiments.benchmarks.compare import __main__ as compare
from experiments.benchmarks.compare import fm_mlp, points, reference, report, workers
from experiments.benchmarks.compare.rows import ROWS, Line, Row

RESULTS = pathlib.Path(__file__).parents[2] / "experiments/benchmarks/results"
LAYERS = [
    (0.5 * np.random.default_rng(i).standard_normal((a, b)), np.full(b, 0.1))
    for i, (a, b) in enumerate([(3, 8), (8, 8), (8, 2)])
]


def velocity(t, x):
    """The reference's network in JAX."""
    h = jnp.concatenate([x, jnp.broadcast_to(t, (len(x), 1))], axis=1)
    for n, (kernel, bias) in enumerate(LAYERS):
        h = h @ jnp.asarray(kernel, h.dtype) + jnp.asarray(bias, h.dtype)[None]
        h = jax.nn.silu(h) if n < len(LAYERS) - 1 else h
    return h


@pytest.mark.slow
def test_the_reference_agrees_with_fmjax():
    """Backwards with the log-density, and forwards again from where that ended."""
    x1 = points.normal(16)
    solved = jax.jit(lambda x1: fm.integrate_log_prob(velocity, x1))(x1)
    np.testing.assert_allclose(solved.log_prob, reference.log_prob(LAYERS, x1), atol=1e-4)
    np.testing.assert_allclose(x1, reference.sample(LAYERS, np.asarray(solved.x0)), atol=1e-4)


def test_the_references_divergence_is_the_trace_of_finite_differences():
    x, step = points.normal(4).astype(np.float64), 1e-6
    _, div = reference.velocity(LAYERS, 0.3, x)
    for i in range(2):
        shift = step * np.eye(2)[i]
        ahead, behind = (reference.velocity(LAYERS, 0.3, x + s * shift)[0] for s in (1, -1))
        div = div - (ahead - behind)[:, i] / (2 * step)
    np.testing.assert_allclose(div, 0, atol=1e-8)


def made(seconds, errors=(), facts=()):
    line = Line("a row", "steps/s", "fmjax/jit", ("torch/one", "torch/two"), 2.0)
    return line, {"seconds": seconds, "errors": dict(errors), "facts": dict(facts)}


def test_the_ratio_is_the_median_of_paired_ratios_against_the_fastest_peer():
    line, row = made(
        {
            "fmjax/jit": [1.0, 2.0, 4.0],
            "torch/one": [9.0, 9.0, 9.0],
            "torch/two": [3.0, 4.0, 20.0],  # ratios 3, 2, 5: their median is not 4 / 2
        }
    )
    text = report._line(line, row, "peer")
    cells = [cell.strip() for cell in text.strip("|").split("|")]
    assert cells == [
        "a row",
        "0.500 steps/s",
        "0.250 steps/s",
        "peer (two)",
        "3.00x",
        "2.00 .. 5.00",
        ">= 2x",
    ]


def test_a_peer_that_is_not_there_leaves_a_line_that_says_so():
    line, row = made({"fmjax/jit": [0.5]}, {"torch": "not installed: torch"})
    cells = [cell.strip() for cell in report._line(line, row, "peer").strip("|").split("|")]
    assert cells[1:5] == ["2.00 steps/s", "not installed: torch", "peer", ""]


@pytest.mark.parametrize(
    ("seconds", "unit", "text"),
    [
        (0.0123, "ms", "12.3 ms"),
        (0.0005, "ms", "0.500 ms"),
        (25.04, "s", "25.0 s"),
        (1 / 4.13, "images/s", "4.13 images/s"),
        (1 / 3190.4, "steps/s", "3,190 steps/s"),
    ],
)
def test_figures_keep_three_digits(seconds, unit, text):
    assert report._figure([seconds], unit) == text


def test_the_loops_own_work_is_set_against_the_step():
    rows = {"unet_training": {"seconds": {"fmjax/jit": [0.2, 0.2, 9.0]}}}
    assert report._host_share(rows) == []
    rows["input"] = {"seconds": {"fmjax/batch": [0.0, 0.001, 0.001]}}
    assert "take 0.005 of" in report._host_share(rows)[0]


class FakeSide:
    """A side whose cases take what a script says, and that notes who was asked when."""

    def __init__(self, name, script, log):
        self.name, self.script, self.log = name, iter(script), log
        self.work = {"case": 10.0}

    def repeat(self, case):
        self.log.append(self.name)
        value = next(self.script)
        if isinstance(value, Exception):
            raise value
        return value


ROW = Row("", "", {"a": "", "b": ""}, (Line("", "s", "a/case", ("b/case",)),))


def test_repetitions_are_interleaved_and_divided_by_the_work():
    log = []
    sides = {name: FakeSide(name, [1.0, 2.0, 3.0], log) for name in "ab"}
    seconds = compare._interleave(ROW, sides, {}, 3)
    assert log == ["a", "b"] * 3
    assert seconds == {"a/case": [0.1, 0.2, 0.3], "b/case": [0.1, 0.2, 0.3]}


def test_a_side_that_fails_half_way_leaves_the_other():
    sides = {"a": FakeSide("a", [1.0] * 3, []), "b": FakeSide("b", [1.0, workers.Failed("x")], [])}
    errors = {}
    assert list(compare._interleave(ROW, sides, errors, 3)) == ["a/case"]
    assert errors == {"b": "x"}


def test_a_process_answers_and_a_broken_one_says_why(tmp_path):
    options = workers.Options(1, tmp_path)
    with contextlib.closing(workers.Side("probes:counting", options)) as side:
        assert side.work == {"count": 2.0}
        assert side.repeat("count") == 2.0  # the first was its warming
        assert side.facts("count") == {"threads": 1, "cores": 1}
    for function, message in (("raising", "IndexError: no"), ("missing", "not installed: nowhere")):
        with pytest.raises(workers.Failed, match=message):
            workers.Side(f"probes:{function}", options)
    with contextlib.closing(workers.Side("probes:dying", options)) as side:
        with pytest.raises(workers.Failed, match="the process ended"):
            side.repeat("die")


def test_every_line_names_sides_of_its_own_row():
    for row in ROWS.values():
        for line in row.lines:
            assert {name.split("/")[0] for name in (line.ours, *line.peers)} <= set(row.sides)


@pytest.mark.slow
def test_selu_by_exp_is_selu_up_to_rounding():
    x = jnp.concatenate([jnp.linspace(-20, 5, 1001), jnp.array([0.0, 1e-8, -1e-8, -1e4, 1e4])])
    for order in range(3):
        ours, theirs = fm_mlp.selu, jax.nn.selu
        for _ in range(order):
            ours, theirs = jax.grad(ours), jax.grad(theirs)
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), atol=4e-7, rtol=1e-6)


@pytest.mark.slow
def test_with_the_examples_last_the_network_is_the_same():
    last, first = fm_mlp.MLP(examples_last=True), fm_mlp.MLP()
    x, t = points.normal(8), jnp.linspace(0, 1, 8)
    params = jax.jit(last.init)(jax.random.key(0), t, x)
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases too
    np.testing.assert_allclose(last.apply(params, t, x), first.apply(params, t, x), rtol=1e-5)


@pytest.mark.slow
def test_steps_whose_numbers_are_drawn_at_once_are_the_single_ones():
    state, step = fm_mlp.make_step(fm_mlp.MLP(examples_last=True))
    key = jax.random.key(1)
    single = jax.jit(lambda state, n: step(state, key, fm_mlp.draw(jax.random.fold_in(key, n))))
    alone, losses = state, []
    for n in range(4):
        alone, metrics = single(alone, n)
        losses.append(float(metrics.loss))
    two = jax.jit(lambda state: fm_mlp.train(state, step, key, 2))
    state, first = two(state)
    _, second = two(state)  # its numbers are those of the third and fourth step
    got = np.concatenate([first.loss, second.loss])
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert len(set(losses)) == 4


def test_wrong_flags_are_refused():
    for wrong in ({"rows": ("unet",)}, {"repetitions": 0}, {"threads": -1}):
        with pytest.raises(ValueError, match="--rows are among"):
            compare.main(compare.Config(**wrong))


def test_the_recorded_table_is_made_from_its_record():
    record = json.loads((RESULTS / "compare.json").read_text())
    assert (RESULTS / "compare.md").read_text() == report.table(record)


def test_the_looser_tolerance_is_recorded_with_an_error_below_the_peers():
    facts = json.loads((RESULTS / "compare.json").read_text())["rows"]["log_density"]["facts"]
    ours = [fact for name, fact in facts.items() if "at 2e-05" in name]
    assert len(ours) == 3  # as the lines' labels say of all three places
    for kind in ("rms", "largest"):
        assert max(fact[kind] for fact in ours) < facts["torch/1024 error"][kind]
