"""A finished run as one file: `fmjax.evaluation.export` as a command.

python -m experiments.export runs/digits digits.safetensors
"""

from fmjax.evaluation import export
from fmjax.harness import command

if __name__ == "__main__":
    command.run(export.main, export.Config, name="experiments.export", doc=export.__doc__)
