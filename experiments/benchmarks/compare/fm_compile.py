"""Compile time of the U-Net's training step: each time in a fresh process, imports left out.

    python -m experiments.benchmarks.compare.fm_compile FOLDER

prints the seconds that tracing, lowering and compiling the step take, with JAX's persistent
compilation cache in FOLDER.
"""

import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.compare.workers import Case, Options


def compiling(options: Options) -> dict[str, Case]:
    """Cold is a first process with an empty folder, cached a second one with the same."""
    folders: list[str] = []

    def cold() -> float:
        folders.append(tempfile.mkdtemp(dir=options.folder))
        return _run(folders[-1])

    return {"cold": Case(cold, 1), "cached": Case(lambda: _run(folders[-1]), 1)}


def _run(folder: str) -> float:
    command = [sys.executable, "-m", __name__, folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(folder: str) -> None:
    import jax

    from experiments.benchmarks.compare import fm_unet
    from fmjax import models, training

    model, x1, key = models.cifar10_unet(), fm_unet.batch(), jax.random.key(1)
    tx, step = fm_unet.make_step(model)
    state = training.init_train_state(fm_unet.init(model), tx)
    jax.config.update("jax_compilation_cache_dir", folder)  # after the network's initialisation
    began = time.perf_counter()
    step.lower(state, key, x1).compile()
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1])
