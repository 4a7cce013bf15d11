"""The README's code and the notebooks run; the tables of all READMEs are those of the records."""

import json
import pathlib
import re

import jax
import nbclient
import nbformat
import numpy as np
import pytest

from experiments import cost_of_likelihood, few_steps_report, toy_report
from experiments.benchmarks import (
    bridge_energy,
    bridges_table,
    couplings,
    ddpm_report,
    flow_map_step,
    learned_solvers,
    networks,
    schedules,
    single_cell,
    uneven,
)
from experiments.benchmarks.compare import report as report_of_compare
from fmjax.evaluation import report

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/benchmarks/results"
README, EXPERIMENTS, RECORDS = (
    ROOT / "README.md", ROOT / "experiments/README.md", RESULTS / "README.md"
)  # fmt: skip
ROOMS = ROOT / "fmjax/README.md"
NOTEBOOKS = sorted((ROOT / "experiments/notebooks").glob("*.ipynb"))


def copied(path, marker):
    """The table after `<!-- marker -->` in a file."""
    found = re.search(rf"<!-- {marker} -->\n\n(.*?\n)\n", path.read_text(), re.S)
    assert found, f"{path} has no table {marker}"
    return found.group(1)


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1500


@pytest.mark.parametrize(
    "path",
    [README, ROOMS, EXPERIMENTS, RECORDS],
    ids=["top", "rooms", "experiments", "results"],
)
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }


@pytest.mark.slow
def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
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


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def num_pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_run(path, monkeypatch):
    """Their own asserts hold, and they draw as many pictures as are stored in them."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # another backend would draw no inline pictures
    notebook = nbformat.read(path, as_version=4)
    stored = num_pictures(notebook)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}})
    client.execute()
    assert num_pictures(notebook) == stored
    text = "".join(output.get("text", "") for output in outputs(notebook))
    if "density sums to" in text:
        mass = float(re.search(r"density sums to ([\d.]+)", text).group(1))
        assert abs(mass - 1) < 0.02  # a sum over a grid of 100 x 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_are_stored_as_they_ran(path):
    """All cells in order, with what they printed and drew, no error, nothing of a machine."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))
    assert not any(cell.metadata for cell in notebook.cells)
    assert path.stat().st_size < 300_000


def test_no_picture_of_the_readmes_is_missing_or_large():
    for path in (README, EXPERIMENTS):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text()):
            most = 1_000_000 if name.endswith(".gif") else 300_000  # an animation has forty frames
            assert (path.parent / name).stat().st_size < most, name


def test_eight_devices():
    assert jax.device_count() == 8  # what the distributed tests rely on


def test_the_results_are_those_of_the_recorded_runs():
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]+\) \| (.*) \|$", README.read_text(), re.M))
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    results = {name: result for name, result in results.items() if "step" in result}  # runs
    assert rows.keys() == results.keys()
    for name, summary in results.items():
        key = "bits_per_dim" if "bits_per_dim" in summary else "log_likelihood"
        figure = f"{summary[key]:.2f} ± {summary[f'{key}_standard_error']:.2f}"
        minutes = f"{summary['wall_seconds'] / 60:.1f} min"
        kind = summary["device"]["device_kind"]
        minutes += "" if kind == "cpu" else f", {kind.removeprefix('NVIDIA ')}"
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
    if path.stem == "digits":
        assert copied(EXPERIMENTS, "evaluation digits") == table


def test_the_toy_table_is_the_recorded_one():
    made = [
        json.loads((RESULTS / f"{n}.json").read_text()) for n in ("toy_table", "toy_table_torchcfm")
    ]
    text = toy_report.markdown(made[0]["pairs"], made[0]["cells"], made[1]["runs"])
    assert (RESULTS / "toy_table.md").read_text() == text
    assert copied(EXPERIMENTS, "toy table") == text.split("\n\n")[0] + "\n"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("uneven", uneven.table),
        ("flow_map_step", flow_map_step.table),
        ("networks", networks.table),
        ("learned_solvers", learned_solvers.table),
        ("few_steps_fashion", few_steps_report.distances),
        ("few_steps_fashion accuracy", few_steps_report.accuracies),
        ("few_steps_fashion solvers", few_steps_report.solvers),
        ("few_steps_digits", few_steps_report.distances),
        ("few_steps_digits accuracy", few_steps_report.accuracies),
        ("few_steps_digits solvers", few_steps_report.solvers),
        ("schedules", schedules.table),
        ("ddpm", ddpm_report.table),
        ("ddpm samples", ddpm_report.samples),
        ("compare", report_of_compare.table),
        ("couplings", couplings.table),
        ("couplings speed", couplings.speeds),
        ("bridges", bridges_table.table),
        ("cost_of_likelihood", lambda record: cost_of_likelihood.markdown(record["cells"])),
        ("bridge_energy", bridge_energy.table),
    ],
)
def test_the_benchmarks_are_the_recorded_ones(name, table):
    text = table(json.loads((RESULTS / f"{name.split()[0]}.json").read_text()))
    assert copied(RECORDS, name) == text.split("\n\n")[0].rstrip("\n") + "\n"


def test_the_left_out_times_are_the_recorded_ones():
    names = ("single_cell", "single_cell_torchcfm")
    records = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    assert copied(EXPERIMENTS, "single cell") == single_cell.table(*records)


def test_the_readmes_speeds_are_rows_of_the_comparison():
    head, line, *rows = copied(README, "speed").splitlines()
    recorded = copied(RECORDS, "compare").splitlines()
    assert [head, line] == recorded[:2] and len(rows) == 5 and set(rows) <= set(recorded[2:])


def test_the_divergences_are_the_recorded_ones():
    errors = json.loads((RESULTS / "divergence.json").read_text())["rmse_bits_per_dim"]
    text = " ".join(EXPERIMENTS.read_text().split())
    for row in errors.values():
        assert "{:.3f}, {:.3f} and {:.3f}".format(*row.values()) in text
