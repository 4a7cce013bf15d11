"""A static site of this repository: README, notebooks, and the API from the docstrings.

    python -m experiments.site
    python -m experiments.site --no-execute    # notebooks with their stored outputs, ten seconds

It needs the extra `docs`. Every link and anchor within the site is checked; a dead one is named
with its page, and the command fails, as it does at any warning. Open build/site/index.html, or put
the folder on any web server; the pages load nothing from elsewhere.
"""

import dataclasses
import pathlib
import shutil
import warnings
from typing import Any

import pdoc.render
from pygments import formatters

from experiments.site import links, notebooks, pages, reference
from fmjax.harness import command

MARK = ".fmjax-site"  # in a folder that may be replaced


@dataclasses.dataclass(frozen=True)
class Config:
    """Builds the site and checks its links."""

    out: pathlib.Path = pathlib.Path("build/site")
    """Folder for the site; an earlier site there is replaced."""
    execute: bool = True
    """Whether to run the notebooks, or to show their stored outputs."""


def main(config: Config) -> None:
    clear(config.out)
    reference.configure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        num_modules = reference.write(config.out / "api")
        linked = notebooks.write(config.out, render, execute=config.execute)
        num_pages = pages.write(config.out, render, linked)
    style = (reference.TEMPLATES / "style.css").read_text()
    (config.out / "style.css").write_text(style + formatters.HtmlFormatter().get_style_defs())
    if dead := links.dead_links(config.out):
        raise ValueError(f"The site has {len(dead)} dead links:\n" + "\n".join(dead))
    print(
        f"{config.out}: {num_pages} pages of the repository, {len(notebooks.paths())} notebooks, "
        f"{num_modules} modules; no dead link"
    )


def clear(out: pathlib.Path) -> None:
    """An empty folder for the site.

    Raises:
      ValueError: if the folder holds anything but a site.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise ValueError(f"{out} holds other files, which stay. Name another folder.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def render(place: pathlib.Path, **context: Any) -> str:
    """A page of the site at `place`, relative to the site's folder."""
    root = "../" * (len(place.parts) - 1)
    return pdoc.render.env.get_template("page.html.jinja2").render(root=root, **context)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.site", doc=__doc__)
