"""From a training step to a run folder: flags, the loop, what a run survives, the command line.

Its modules are imported by name: `from fmjax.harness import loop`. They need the extra
`train`.
"""
