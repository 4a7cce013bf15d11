"""Experiments: one file each, on one training loop. `python -m experiments.digits --help`."""
