"""What flags may be: every number of every experiment, nested or not, before it compiles."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import cifar10, digits, mnist, two_moons
from fmjax.evaluation import report
from fmjax.evaluation.densities import _bound
from fmjax.evaluation.errors import standard_error
from fmjax.harness import config, train
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.pods import cluster, peers
from fmjax.harness.pods.cluster import ClusterConfig
from fmjax.tasks.image_data import load
from fmjax.tasks.images import ImageConfig, UNetConfig
from fmjax.tasks.points import MLPConfig

IMAGES = (digits, mnist, cifar10)
NAN = float("nan")


@pytest.mark.parametrize("module", IMAGES)
@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("channels", 0, "positive; got 0"),
        ("channels", -8, "positive; got -8"),
        ("channel_multipliers", (), "have at least one value; got none"),
        ("channel_multipliers", (1, 0), "positive; got 1 0"),
        ("num_res_blocks", 0, "positive; got 0"),
        ("attention_resolutions", (-4,), "positive; got -4"),
        ("num_heads", 0, "positive; got 0"),
        ("head_channels", 0, "positive; got 0"),
        ("dropout", 1.0, "zero or more and below 1; got 1.0"),
        ("dropout", -0.1, "zero or more and below 1; got -0.1"),
        ("dropout", NAN, "zero or more and below 1; got nan"),
        ("num_groups", 0, "positive; got 0"),
        ("time_scale", 0.0, "positive; got 0.0"),
        ("time_scale", -1.0, "positive; got -1.0"),
        ("time_scale", NAN, "positive; got nan"),
    ],
)
def test_a_unet_that_can_not_be_is_refused(module, field, value, rule):
    flags = module.Config()
    model = dataclasses.replace(flags.model, **{field: value})
    flag = f"--model.{field.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{flag} must (be )?{rule}"):
        train(dataclasses.replace(flags, model=model), module.make_task)


@pytest.mark.parametrize("features", [(), (0,), (128, -1), (16, 0, 16)])
def test_an_mlp_that_can_not_be_is_refused(features):
    model = MLPConfig(features=features)
    with pytest.raises(ValueError, match="^--model.features must"):
        train(two_moons.Config(model=model), two_moons.make_task)


def test_every_number_of_every_experiment_is_looked_at():
    """Each in turn is NaN, the numbers in the networks and the pod too."""
    for module in (two_moons, *IMAGES):
        whole, seen = module.Config(), 0
        parts = (None, "model", "cluster", *(("dit",) if module in IMAGES else ()))
        for part in parts:
            flags = whole if part is None else getattr(whole, part)
            for field in dataclasses.fields(flags):
                value = getattr(flags, field.name)
                value = value[0] if isinstance(value, tuple) and value else value
                if isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                seen += 1
                bad = (NAN,) if isinstance(getattr(flags, field.name), tuple) else NAN
                bad = dataclasses.replace(flags, **{field.name: bad})
                bad = bad if part is None else dataclasses.replace(whole, **{part: bad})
                name = field.name if part is None else f"{part}.{field.name}"
                # The experiment's own number is its own affair.
                check = module.make_task if name == "noise" else config.check_flags
                with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must .*nan"):
                    check(bad)
        assert seen > 12
        config.check_flags(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"decay_steps": 0}, "--decay-steps must be positive; got 0"),
        ({"decay_steps": 50}, "--decay-steps must be above --warmup-steps; got 50 and 100"),
        ({"decay_steps": 799}, "--decay-steps must be at least --num-steps.*got 799 and 800"),
    ],
)
def test_a_decay_that_can_not_be_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train(digits.Config(**flags), digits.make_task)
    config.check_flags(digits.Config(decay_steps=800))
    # More steps than the decay has are refused; fewer leave the rate of each step as it was.
    assert not config.FREE & {"decay_steps", "optimizer", "warmup_steps", "learning_rate"}


def test_what_may_be_zero_or_empty():
    model = UNetConfig(attention_resolutions=(), dropout=0.0)
    config.check_flags(digits.Config(seed=0, warmup_steps=0, ema_decay=0.0, model=model))
    config.check_flags(two_moons.Config(noise=0.0, seed=2**32 - 1, clip_norm=None))
    config.check_flags(
        two_moons.Config(cluster=ClusterConfig(coordinator="a:1", num_processes=1, process_id=0))
    )
    for numbers in ({"a": np.float32(-1)}, {"a": np.int64(0)}, {"a": [1, 0]}):  # NumPy's, lists
        with pytest.raises(ValueError, match="--a must be positive"):
            check_numbers(dataclasses.make_dataclass("Flags", numbers)(**numbers))


def test_no_two_seeds_are_the_same():
    """JAX takes the last 32 bits of a seed."""
    assert (jax.random.key(2**32 + 5) == jax.random.key(5)).all()
    with pytest.raises(ValueError, match=r"--seed must be in 0..4294967295; got 4294967296\.$"):
        train(digits.Config(seed=2**32), digits.make_task)
    seen = [two_moons.moons(4, 0.05, *seed) for seed in ((0, 0), (0, 1), (1, 0), (2**32 - 1, 3, 2))]
    assert len({x.tobytes() for x in seen}) == 4
    for seeds, rule in (((-1,), "be in"), ((3, 3), "be different"), ((), "be different.*none")):
        with pytest.raises(ValueError, match=f"--seeds must {rule}"):
            check_seeds("seeds", seeds)


def test_more_examples_a_step_than_there_are_is_refused_before_compiling(tmp_path):
    for flags in ({"batch_size": 1504}, {"batch_size": 64, "train_split": "train[:40]"}):
        with pytest.raises(ValueError, match="--batch-size must be at most the (1500|40) examples"):
            train(digits.Config(workdir=tmp_path / "run", **flags), digits.make_task)
    with pytest.raises(ValueError, match="--batch-size must be at most the 50000 examples"):
        flags = two_moons.Config(workdir=tmp_path / "run", batch_size=50_008)
        train(flags, two_moons.make_task)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my_images", "my pictures", "data/mine"):
        (tmp_path / name).mkdir(parents=True)
    folders = ["./my_images", str(tmp_path / "my_images"), "my_images", "my pictures", "data/mine"]
    for name in folders:
        with pytest.raises(
            ValueError, match=f'"digits", folder:PATH, .*got {name}: that is a folder'
        ):
            load(ImageConfig(workdir=tmp_path, dataset=name, data_dir=tmp_path), "train")
    for name in ("./nothing", "my.zip"):
        with pytest.raises(ValueError, match=f"--dataset must .*got {name}: TFDS says: Parsing"):
            load(ImageConfig(workdir=tmp_path, dataset=name, data_dir=tmp_path), "train")
    with pytest.raises(ValueError, match="Did you mean 'cifar10'"):  # fmjax.data's own words
        load(ImageConfig(workdir=tmp_path, dataset="cifer10", data_dir=tmp_path), "train")
    (tmp_path / "digits").mkdir()
    assert len(load(ImageConfig(workdir=tmp_path, dataset="digits"), "test").images) == 297


POD = dict(coordinator="localhost:1", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinator": "localhost"}, "--cluster.coordinator must be HOST:PORT; got 'localhost'"),
        ({"coordinator": "localhost:http"}, "--cluster.coordinator must be HOST:PORT"),
        ({"coordinator": "localhost:99999"}, "--cluster.coordinator must be HOST:PORT"),
        ({"process_id": 2}, "--cluster.process-id must be in 0..1.*got 2"),
        ({"process_id": None}, "--cluster.process-id I go together"),
        ({}, "process 0, which listens there; got localhost:1: Connection refused"),
    ],
)
def test_a_pod_that_can_not_be_joined(monkeypatch, change, message):
    monkeypatch.setattr(cluster, "_JOIN_SECONDS", 0.1)
    monkeypatch.setattr(peers, "_NUMBER", [])
    with pytest.raises(ValueError, match=message):
        cluster.join(ClusterConfig(**(POD | change)))


def test_a_pod_that_jax_does_not_detect_names_the_three_flags(monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    flags = "--cluster.coordinator HOST:PORT, --cluster.num-processes N and --cluster.process-id I"
    with pytest.raises(ValueError, match=f"Slurm, .*should be defined. Give {flags}, or"):
        cluster.join(ClusterConfig(join="yes"))


def test_one_value_has_no_standard_error():
    assert standard_error(np.array([3.0])) is None
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    how = type("How", (), {"settings": {"dequantization": "uniform", "divergence": "exact"}})
    bound = _bound(np.full((1, 1, 1), -2.0), (2, 2, 1), 1, how)  # pyright: ignore
    assert bound["standard_error"] is None and "NaN" not in json.dumps(bound)
    several = _bound(np.array([[[-2.0, -3.0]]]), (2, 2, 1), 1, how)  # pyright: ignore
    assert several["standard_error"] > 0
    likelihood = {"bounds": [bound, several], "images": "first 1", "estimator": how.settings}
    solver = {"difference": 0.0, "tolerance": 1e-3, "num_images": 1}
    rows = report._bits(likelihood | {"solver_error": solver})
    assert "±" not in rows[0][1] and "±" in rows[1][1] and "nan" not in str(rows)


@dataclasses.dataclass(frozen=True)
class Own(config.RunConfig):
    """Flags of a user's own."""

    shift: float = -1.0
    dropout: float = 0.0
    names: tuple[str, ...] = ()
    batch_size: int = 8


def test_a_users_own_flags_have_no_bounds_and_those_of_the_package_keep_theirs():
    config.check_flags(Own())
    with pytest.raises(ValueError, match="--batch-size must be positive; got 0"):
        config.check_flags(Own(batch_size=0))
