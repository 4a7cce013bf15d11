"""From a run folder to a table with errors: likelihood, sample quality, cost; samples and export.

Its modules are imported by name: `from fmjax.evaluation import evaluate`. They need the extra
`train`.
"""
