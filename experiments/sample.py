"""Samples from a finished run: `fmjax.evaluation.sample` as a command.

python -m experiments.sample runs/digits --num 64 --seed 5 --labels 3 --guidance 2
"""

from fmjax.evaluation import sample
from fmjax.harness import command

if __name__ == "__main__":
    command.run(sample.main, sample.Config, name="experiments.sample", doc=sample.__doc__)
