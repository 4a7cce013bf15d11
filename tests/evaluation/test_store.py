"""What an evaluation keeps and draws: stored batches, features of samples, the curve's points."""

import jax
import numpy as np
import pytest
from made_runs import known

import fmjax as fm
from fmjax.evaluation import curve, drawing, judging, quality
from fmjax.harness import share, store
from fmjax.harness.task import Samples
from fmjax.metrics import Estimate
from fmjax.metrics.encoders import Encoder


def test_ways():
    points = drawing.ways((4, 8, 200), (1e-3,))
    steps = {(way.solver, way.num_steps) for way in points if way.num_steps}
    assert {("Euler", 200), ("Heun", 2), ("Midpoint", 100), ("Tsit5", 33), ("Dopri5", 1)} <= steps
    assert [way.solver for way in points if way.tolerance] == list(drawing.ADAPTIVE)
    rows = curve.over_seeds([1.0, 3.0])
    assert rows["mean"] == 2.0 and rows["standard_deviation_over_seeds"] == pytest.approx(2**0.5)
    assert curve.over_seeds([1.0])["standard_deviation_over_seeds"] is None


@pytest.mark.slow
def test_the_curve_of_another_seed_is_another(tmp_path):
    """In one store: equal seeds read what is there, another seed's noise is not taken for it."""

    def decay(params, condition):
        return lambda t, x: -x

    model = known(decay, Samples(fm.standard_normal((2,)), lambda x1: {"x": x1}))
    points = drawing.ways((4,), (0.1,))

    def measure(seed):
        return curve.measure(
            model, store.Store(tmp_path, "curve", {}), 8, 12, points,
            lambda x1: Estimate(float(x1.mean()), 0.0), seed=seed, tight=1e-4,
        )  # fmt: skip

    first, second = measure(0), measure(1)
    assert all(a["quality"] != b["quality"] for a, b in zip(first, second, strict=True))
    computed = store.num_computed(tmp_path)
    assert measure(0) == first and store.num_computed(tmp_path) == computed == 2 * 2 * len(first)


def test_store(tmp_path):
    batches = store.Store(tmp_path, "samples", {"seed": 0})
    first = batches.get("a", lambda: {"x": np.arange(3)})
    second = batches.get("a", lambda: pytest.fail("computed twice"))
    np.testing.assert_array_equal(first["x"], second["x"])
    assert first["seconds"] == second["seconds"] and store.num_computed(tmp_path) == 1
    other = store.Store(tmp_path, "samples", {"seed": 1}).get("a", lambda: {"x": np.zeros(1)})
    assert other["x"] == 0 and store.num_computed(tmp_path) == 2
    path = batches.folder / "a.npz"
    for damage in (path.read_bytes()[:-40], b"", b"no zip"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="a.npz, which can't be read"):
            batches.get("a", lambda: pytest.fail("computed over a damaged file"))
    np.savez(path, x=np.array([{"an": "object"}], dtype=object))  # it would need a pickle
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        batches.get("a", dict)


def test_another_number_of_samples_takes_no_stale_features(tmp_path):
    """The last batch of 100 = 40 + 40 + 20 is a short one; it is filled up for the encoder."""
    images = np.random.default_rng(0).integers(17, size=(120, 8, 8, 1), dtype=np.uint8)
    sizes = set()

    def features(images):
        sizes.add(len(images))
        return images.reshape(len(images), -1)[:, :3].astype(np.float32)

    judge = judging.Judge(Encoder("e", "d", features, None, 3), None, 10, 4, False, {})  # pyright: ignore
    drawn, encoded = (store.Store(tmp_path, kind, {}) for kind in ("samples", "features"))
    samples = [
        share.Batch(drawn, f"{i}", lambda i=i: {"x1": images[40 * i : 40 * i + 40]}, "samples")
        for i in range(3)
    ]

    def features_of(num):
        own = samples[: -(-num // 40)]
        batches = quality.encode_samples(judge, encoded, "seed_0", own, 40, num)
        return np.concatenate([batch.get()["features"] for batch in batches])

    for num in (95, 100, 90, 120, 95):
        got = features_of(num)
        np.testing.assert_array_equal(got, images[:num].reshape(num, -1)[:, :3])
    assert sizes == {40}


def batches_of(tmp_path, counts):
    """Batches of several stores, of one kind each."""
    stores = {kind: store.Store(tmp_path, kind, {}) for kind in counts}
    return [
        share.Batch(stores[kind], str(i), lambda: {"x": np.zeros(1)}, kind)
        for kind, count in counts.items()
        for i in range(count)
    ]


def test_every_batch_is_one_process_s(tmp_path, monkeypatch):
    """A sample and its features are the same process's, and all have as many to one in a store."""
    batches = batches_of(tmp_path, {"log_prob": 4, "samples": 7, "features": 7})
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append([(batch.kind, batch.name) for batch in share._own(batches)])
    assert sorted(sum(parts, [])) == sorted((batch.kind, batch.name) for batch in batches)
    for part in parts:
        names = {kind: [n for k, n in part if k == kind] for kind in ("samples", "features")}
        assert names["samples"] == names["features"] and len(names["samples"]) in (2, 3)


def test_the_expected_time_is_that_of_the_second_of_a_kind(tmp_path, monkeypatch):
    """Compilation, in the first one, counts where there is no other figure, and as a bound."""
    clock = [0.0]
    monkeypatch.setattr(share.time, "perf_counter", lambda: clock[0])
    batches = batches_of(tmp_path, {"samples": 12, "curve": 2})

    def computing(batch, seconds):
        def compute():
            clock[0] += seconds
            return {"x": np.zeros(1)}

        return batch._replace(compute=compute)

    slow = [computing(b, 100.0 if b.name == "0" else 7.0) for b in batches]
    said = []
    monkeypatch.setattr(share, "_expected", lambda *args, f=share._expected: said.append(f(*args)))
    monkeypatch.setattr("tqdm.tqdm.write", lambda *args, **kwargs: None)
    share.solve(slow, "batches")
    assert said == ["Expected time: at most 3 min for 11 more batches."]  # 10 x 7 s and 100 s
    again = [computing(b, 0.0) for b in slow]
    share.solve(again, "batches")
    assert len(said) == 1 and store.num_computed(tmp_path) == 14


def test_batches_that_are_on_another_disk_are_named_and_computed(tmp_path, monkeypatch, capsys):
    batches = batches_of(tmp_path, {"samples": 5})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(share.cluster, "wait", lambda name: None)
    share.solve(batches, "batches")
    assert f"2 batches of other processes are not in {tmp_path}" in capsys.readouterr().err
    assert all(batch.get()["x"] == 0 for batch in batches)
