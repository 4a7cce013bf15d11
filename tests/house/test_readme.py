"""The README's code and the notebook run; the README's table is that of the recorded runs."""

import json
import pathlib
import re

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from experiments import report, toy_report
from experiments.benchmarks import uneven
from experiments.benchmarks.compare import report as report_of_compare

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/benchmarks/results"


def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    # What the lines are there for: samples on the moons, and log-densities that are finite.
    x1 = np.asarray(namespace["x1"])
    moons = np.asarray(namespace["moons"])
    nearest = np.sqrt(((x1[:, None] - moons[None, :2000]) ** 2).sum(-1)).min(1)
    assert np.quantile(nearest, 0.9) < 0.2, nearest
    assert np.isfinite(namespace["log_p"]).all() and np.mean(namespace["log_p"]) > -2.5


def test_the_notebook_runs(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # another backend would draw no inline pictures
    notebook = nbformat.read(ROOT / "experiments/notebooks/quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}})
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    mass = float(re.search(r"density sums to ([\d.]+)", text).group(1))
    assert abs(mass - 1) < 0.02  # a sum over a grid of 100 x 100
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    assert sum("image/png" in o["data"] for o in pictures) == 4


def test_no_picture_in_the_readme_is_missing_or_large():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).stat().st_size < 300_000, name


def test_eight_devices():
    assert jax.device_count() == 8  # what the distributed tests rely on


def test_the_results_are_those_of_the_recorded_runs():
    rows = dict(
        re.findall(r"^\| \[`(\w+)`\]\([^)]+\) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    )
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    results = {name: result for name, result in results.items() if "step" in result}  # runs
    assert rows.keys() == results.keys()
    for name, summary in results.items():
        key = "bits_per_dim" if "bits_per_dim" in summary else "log_likelihood"
        figure = f"{summary[key]:.2f} ± {summary[f'{key}_standard_error']:.2f}"
        minutes = f"{summary['wall_seconds'] / 60:.1f} min"
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert cells[1:] == [
            f"{summary['step']:,}",
            minutes,
            figure + (" bits/dim" if key == "bits_per_dim" else " nats"),
            str(summary["num_evaluations"]),
        ], name


@pytest.mark.parametrize("path", sorted((RESULTS / "evaluations").glob("*.json")), ids=str)
def test_the_evaluations_are_the_recorded_ones(path):
    """The table of each is made from its JSON, and those in the README are copies."""
    table = report.table(json.loads(path.read_text()))
    assert path.with_suffix(".md").read_text() == table
    text = (ROOT / "README.md").read_text()
    if marker := re.search(rf"<!-- evaluation {path.stem} -->\n\n(.*?\n)\n", text, re.S):
        assert marker.group(1) == table


def test_the_readme_shows_an_evaluation():
    assert re.search(r"<!-- evaluation (\w+) -->", (ROOT / "README.md").read_text())


def test_the_toy_table_is_the_recorded_one():
    made = [
        json.loads((RESULTS / f"{n}.json").read_text()) for n in ("toy_table", "toy_table_torchcfm")
    ]
    text = toy_report.markdown(made[0]["pairs"], made[0]["cells"], made[1]["runs"])
    assert (RESULTS / "toy_table.md").read_text() == text
    copied = re.search(r"<!-- toy table -->\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S)
    assert copied.group(1) == text.split("\n\n")[0]


@pytest.mark.parametrize(
    ("name", "table"), [("uneven", uneven.table), ("compare", report_of_compare.table)]
)
def test_the_benchmarks_are_the_recorded_ones(name, table):
    text = table(json.loads((RESULTS / f"{name}.json").read_text()))
    readme = (ROOT / "README.md").read_text()
    copied = re.search(rf"<!-- {name} -->\n\n(.*?\n)\n", readme, re.S)
    assert copied.group(1) == text.split("\n\n")[0].rstrip("\n") + "\n"


def test_the_divergences_are_the_recorded_ones():
    errors = json.loads((RESULTS / "divergence.json").read_text())["rmse_bits_per_dim"]
    text = " ".join((ROOT / "README.md").read_text().split())
    for row in errors.values():
        assert "{:.3f}, {:.3f} and {:.3f}".format(*row.values()) in text
