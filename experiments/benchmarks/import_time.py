"""How long `import fmjax` takes in a fresh process, against its three dependencies alone.

    python -m experiments.benchmarks.import_time

Nine processes each, in turn, after one of each that is not counted; prints medians and their ratio.
"""

import statistics
import subprocess
import sys
import time

STATEMENTS = {"fmjax": "import fmjax", "dependencies": "import jax, diffrax, optax"}
REPETITIONS = 9


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def main() -> None:
    times = {name: [] for name in STATEMENTS}
    for _ in range(REPETITIONS + 1):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, statement in STATEMENTS.items():
        print(f"{statement:32} {medians[name]:.2f} s")
    print(f"ratio {medians['fmjax'] / medians['dependencies']:.2f}")


if __name__ == "__main__":
    main()
