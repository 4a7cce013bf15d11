"""A small classifier as an encoder: `fmjax.evaluation.encoder` as a command.

python -m experiments.encoder --dataset fashion_mnist
"""

from fmjax.evaluation import encoder
from fmjax.harness import command

if __name__ == "__main__":
    command.run(encoder.main, encoder.Config, name="experiments.encoder", doc=encoder.__doc__)
