"""The notebooks as pages, executed or as they are stored, and the list of them."""

import pathlib
import re
from typing import NamedTuple

import nbclient
import nbconvert
import nbformat

from experiments.site import pages

FOLDER = pages.ROOT / "experiments/notebooks"
FIRST = ("quickstart",)  # the others follow by name


class Notebook(NamedTuple):
    """A row of the list: its page, its title, and its first paragraph."""

    page: str
    title: str
    summary: str


def paths() -> list[pathlib.Path]:
    """All notebooks, in the order of the list."""
    return sorted(FOLDER.glob("*.ipynb"), key=lambda path: (path.stem not in FIRST, path.stem))


def write(out: pathlib.Path, render: pages.Render, *, execute: bool) -> list[pathlib.Path]:
    """Writes a page for every notebook, and the list.

    Args:
      out: folder of the site.
      render: puts a body into the site's frame.
      execute: whether to run them; else the outputs are those that are stored.

    Returns:
      The files of the repository that the notebooks link to.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
      ValueError: if a link leads nowhere.
    """
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    exporter = nbconvert.HTMLExporter(template_name="basic")
    rows, links = [read(path) for path in paths()], []
    for path, row in zip(paths(), rows, strict=True):
        notebook = nbformat.read(path, as_version=4)
        if execute:
            print(f"{path.name} ...", flush=True)
            run(notebook)
        links += _follow_links(notebook, path)
        body, _ = exporter.from_notebook_node(notebook)
        place = pages.location(path)
        (out / place).write_text(render(place, title=row.title, body=body, notebooks=rows))
    place = pathlib.Path("notebooks/index.html")
    (out / place).write_text(render(place, title="Notebooks", listed=rows, notebooks=rows))
    return links


def run(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells, from the root of the repository, and keeps their outputs."""
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": pages.ROOT}},
        # Else it warns that its port on this machine is not encrypted.
        extra_arguments=["--log-level=ERROR"],
    ).execute()


def read(path: pathlib.Path) -> Notebook:
    """A notebook's row, from its first cell: a title and a paragraph.

    Raises:
      ValueError: if that cell holds something else.
    """
    first = nbformat.read(path, as_version=4).cells[0]
    title, _, text = first.source.partition("\n\n")
    if first.cell_type != "markdown" or not title.startswith("# ") or not text:
        raise ValueError(f"{path.name} must begin with a cell of a title and a paragraph.")
    return Notebook(f"{path.stem}.html", title.removeprefix("# "), text.split("\n\n")[0])


def _follow_links(notebook: nbformat.NotebookNode, path: pathlib.Path) -> list[pathlib.Path]:
    """Makes the links of the text the site's; the files that they lead to."""
    found = []

    def follow(match: re.Match[str]) -> str:
        target = pages.follow(match[1], path)
        if target is None:
            return match[0]
        found.append(target)
        return f"]({pages.relative(match[1], target, path)})"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([^)\s]+)\)", follow, cell.source)
    return found
