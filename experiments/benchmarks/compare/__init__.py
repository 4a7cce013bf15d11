"""fmjax and its peers side by side: `python -m experiments.benchmarks.compare`."""
