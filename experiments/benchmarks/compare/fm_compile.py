"""Compile time of the U-Net's training step: each time in a fresh process, imports left out.

    python -m experiments.benchmarks.compare.fm_compile FOLDER [cpu]

prints the seconds that tracing, lowering and compiling the step take, with JAX's persistent
compilation cache in FOLDER; with "cpu" that of the network with `fmjax.models.cpu.KERNELS`.
"""

import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.compare.workers import Case, Options


def compiling(options: Options) -> dict[str, Case]:
    """Cold is a first process with an empty folder, cached a second one with the same."""
    return _cases(options) | _cases(options, "cpu")


def _cases(options: Options, *kernels: str) -> dict[str, Case]:
    folders: list[str] = []

    def cold() -> float:
        folders.append(tempfile.mkdtemp(dir=options.folder))
        return _run(folders[-1], *kernels)

    cases = {"cold": Case(cold, 1), "cached": Case(lambda: _run(folders[-1], *kernels), 1)}
    return {" ".join([name, *kernels]): case for name, case in cases.items()}


def _run(folder: str, *kernels: str) -> float:
    command = [sys.executable, "-m", __name__, folder, *kernels]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(folder: str, kernels: str = "") -> None:
    import jax

    from experiments.benchmarks.compare import fm_unet
    from fmjax import models, training

    model = fm_unet.network() if kernels == "cpu" else models.cifar10_unet()
    x1, key = fm_unet.batch(), jax.random.key(1)
    tx, step = fm_unet.make_step(model)
    state = training.init_train_state(fm_unet.init(model), tx)
    jax.config.update("jax_compilation_cache_dir", folder)  # after the network's initialisation
    began = time.perf_counter()
    step.lower(state, key, x1).compile()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
