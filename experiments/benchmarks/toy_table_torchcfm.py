"""The table of `experiments.toy_table` from torchcfm's own code, on this machine.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.toy_table_torchcfm

in an environment with the extra `benchmarks` (torch, torchcfm, which brings torchdyn, and POT). It
imports no JAX.
torchcfm's matchers, MLP (SELU, time beside the coordinates), exact-OT sampler and 2-Wasserstein
distance, torch's AdamW and torchdyn's Euler solver; data from scikit-learn and torchdyn, scaled as
the repository's own runner scales them. Protocol and sources: docstring of `experiments.toy_table`.

A run (data pair, method, seed) that is finished has a file of its own in the run folder: started
again, the command does what is missing, then writes results/toy_table_torchcfm.json.

Two facts about torchcfm 1.0.7 that matter here. Its OT sampler draws the batch's pairs from the
plan with replacement: 63 % of a batch is used, some pairs twice. And it draws them from numpy's
global generator, so that torch's seed alone doesn't repeat a run; this script seeds both.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_moons, make_s_curve
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
)
from torchcfm.models import MLP
from torchcfm.optimal_transport import wasserstein
from torchcfm.utils import torch_wrapper
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_gaussians

RESULTS = pathlib.Path(__file__).parent / "results" / "toy_table_torchcfm.json"
METHODS = {
    "OT-CFM": ExactOptimalTransportConditionalFlowMatcher,
    "I-CFM": ConditionalFlowMatcher,
    "FM": TargetConditionalFlowMatcher,
}
PACKAGES = ("torch", "torchcfm", "torchdyn", "POT", "numpy", "scikit-learn")


def gaussian(num: int) -> np.ndarray:
    return np.random.standard_normal((num, 2))


def ring(num: int) -> np.ndarray:
    """Eight Gaussians of deviation 1 at radius 5."""
    x, _ = generate_gaussians(-(-num // 8), n_gaussians=8, radius=5, std_gaussians=1, noise=1e-4)
    return np.random.permutation(x.numpy())[:num]


def wide_ring(num: int) -> np.ndarray:
    """Eight Gaussians of deviation 1.5 at radius 12."""
    angles = np.random.randint(8, size=num) * np.pi / 4
    centres = 4.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return 3.0 * (centres + 0.5 * np.random.standard_normal((num, 2)))


def moons(num: int) -> np.ndarray:
    return 2.0 * make_moons(num, noise=0.05)[0] - [1.0, 0.0]


def wide_moons(num: int) -> np.ndarray:
    x, _ = make_moons(num, noise=0.1)
    return 7.0 * (x - x.mean()) / x.std()


def s_curve(num: int) -> np.ndarray:
    return 1.5 * make_s_curve(num, noise=0.05)[0][:, [0, 2]]


PAIRS = {
    "gaussian-8gaussians": (gaussian, ring),
    "moons-8gaussians": (wide_moons, wide_ring),
    "gaussian-moons": (gaussian, moons),
    "gaussian-scurve": (gaussian, s_curve),
}


class WithEnergy(torch.nn.Module):
    """d/dt (x, e) = (v, |v|^2) for torchdyn, on states `[batch, 3]`."""

    def __init__(self, velocity: torch.nn.Module):
        super().__init__()
        self.velocity = velocity

    def forward(self, t: torch.Tensor, state: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        u = self.velocity(t, state[:, :2])
        return torch.cat([u, (u**2).sum(1, keepdim=True)], dim=1)


def split(sampler: Any, num_train: int, num_test: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = np.random.permutation(sampler(num_train + num_test)).astype(np.float32)
    return torch.from_numpy(x[:num_train]), torch.from_numpy(x[num_train:])


def train(flow: Any, source: Any, target: torch.Tensor, args: argparse.Namespace) -> MLP:
    """`source` is None for fresh standard normal draws, else the training points."""
    model = MLP(dim=2, time_varying=True, w=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(args.num_steps):
        x1 = target[torch.randint(len(target), (args.batch_size,))]
        x0 = torch.randn_like(x1)
        if source is not None:
            x0 = source[torch.randint(len(source), (args.batch_size,))]
        t, x_t, u_t = flow.sample_location_and_conditional_flow(x0, x1)
        loss = torch.mean((model(torch.cat([x_t, t[:, None]], dim=-1)) - u_t) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def run(pair: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    (source, x0), (target, x1) = (split(s, args.num_train, args.num_test) for s in PAIRS[pair])
    began = time.perf_counter()
    source = None if PAIRS[pair][0] is gaussian else source
    model = train(METHODS[method](sigma=args.sigma), source, target, args)
    seconds = time.perf_counter() - began
    node = NeuralODE(WithEnergy(torch_wrapper(model)), solver="euler")
    state = torch.cat([x0, torch.zeros(len(x0), 1)], dim=1)
    with torch.no_grad():
        end = node.trajectory(state, t_span=torch.linspace(0, 1, 101))[-1]
    return {
        "pair": pair,
        "method": method,
        "seed": seed,
        "wasserstein2": wasserstein(end[:, :2], x1, power=2),
        "path_energy": end[:, 2].double().mean().item(),
        "training_seconds": round(seconds, 2),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.toy_table_torchcfm")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/toy_table_torchcfm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-train", type=int, default=10_000)
    parser.add_argument("--num-test", type=int, default=1_000)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


def write(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # networks this small are slower on two
    args.workdir.mkdir(parents=True, exist_ok=True)
    protocol = {k: v for k, v in vars(args).items() if k not in ("workdir", "seeds", "output")}
    runs = []
    for seed in args.seeds:
        for pair in PAIRS:
            for method in METHODS:
                if method == "FM" and PAIRS[pair][0] is not gaussian:
                    continue  # its path starts at a standard normal
                path = args.workdir / f"{pair}_{method}_{seed}.json"
                if not path.exists():
                    write(path, {"protocol": protocol, "run": run(pair, method, seed, args)})
                record = json.loads(path.read_text())
                if record["protocol"] != protocol:
                    raise ValueError(
                        f"{path} was made under {record['protocol']}, not {protocol}. Take another "
                        "--workdir."
                    )
                runs.append(record["run"])
                print(json.dumps(record["run"]), flush=True)
    write(
        args.output,
        {
            "experiment": "toy_table_torchcfm",
            "command": "python -m experiments.benchmarks.toy_table_torchcfm",
            "date": datetime.date.today().isoformat(),
            "hardware": f"one core of a shared {platform.machine()} server, no GPU",
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
            "protocol": protocol,
            "training_seconds": round(sum(r["training_seconds"] for r in runs), 1),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
