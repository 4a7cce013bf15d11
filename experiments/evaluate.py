"""From a run folder to a table: `fmjax.evaluation.evaluate` as a command.

    python -m experiments.evaluate runs/digits

The protocol, which figures are comparable and what each error means are in experiments/README.md.
"""

from fmjax.evaluation import evaluate
from fmjax.harness import command

if __name__ == "__main__":
    command.run(evaluate.main, evaluate.Config, name="experiments.evaluate", doc=evaluate.__doc__)
