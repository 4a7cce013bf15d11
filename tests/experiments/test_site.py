"""The site: dead links are found, links of the repository become the site's, all rooms show."""

import pathlib
import re
import sys

import nbformat
import pytest

from experiments.site import links
from fmjax.harness import command

ROOT = pathlib.Path(__file__).parents[2]


def site(folder, **pages):
    """A folder of pages, `name=html`; two underscores are a slash."""
    for name, text in pages.items():
        path = folder / (name.replace("__", "/") + ".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_good_links_are_good(tmp_path):
    (tmp_path / "a picture.png").touch()
    site(
        tmp_path,
        index='<h1 id="top-one">a</h1> <a href="#top-one">1</a> <a href="deep/page.html#b">2</a>'
        '<a href="deep/page.html#name">3</a> <img src="a%20picture.png"> <a href="deep/">4</a>'
        '<a href="https://example.org/gone">5</a> <a href="mailto:a@b">6</a><img src="data:,">'
        '<script>const a = `<a href="${url}">`;</script>',
        deep__page='<p id="b"><a name="name"></a><a href="../index.html#top-one">up</a>',
        deep__index='<meta http-equiv="refresh" content="0; url=./page.html">',
    )
    assert links.dead_links(tmp_path) == []


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ('<a href="gone.html">', "no such file"),
        ('<img src="gone.png">', "no such file"),
        ('<a href="folder/">', "no such file"),
        ('<a href="#gone">', "no such anchor"),
        ('<a href="other.html#gone">', "no such anchor"),
        ('<a href="other.html#Here">', "no such anchor"),
        ('<a href="text.txt#here">', "no such anchor"),
        ('<a href="/other.html">', "begins with /"),
        ('<a href="../outside.html">', "leaves the site"),
        ('<meta http-equiv="refresh" content="0; url=gone.html">', "no such file"),
    ],
)
def test_a_planted_dead_link_is_found(tmp_path, link, why):
    root = site(tmp_path / "site", index=f'<p id="x">{link}', other='<p id="here">')
    (root / "folder").mkdir()
    (root / "text.txt").touch()
    (tmp_path / "outside.html").touch()
    (found,) = links.dead_links(root)
    assert found.startswith("index.html: ") and found.endswith(f"({why})")


def test_links_of_markdown_are_those_of_the_site():
    pytest.importorskip("markdown_it")
    from experiments.site import pages

    page = pages.read_markdown(ROOT / "experiments/README.md")
    assert 'href="../index.html"' in page.body and 'href="digits.py.html"' in page.body
    assert 'href="benchmarks/results/index.html#on-a-gpu"' in page.body
    assert ROOT / "experiments/digits.py" in page.links
    with pytest.raises(ValueError, match="README.md links to gone.md, which is no file"):
        pages.follow("gone.md", ROOT / "README.md")
    with pytest.raises(ValueError, match="links to ../secret, which is no file"):
        pages.follow("../secret", ROOT / "README.md")


def test_headings_of_one_text_have_two_anchors(tmp_path, monkeypatch):
    pytest.importorskip("markdown_it")
    from experiments.site import pages

    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# A b, `c`\n\n## Twice\n\n## Twice\n")
    anchors = [heading.anchor for heading in pages.read_markdown(tmp_path / "README.md").headings]
    assert anchors == ["a-b-c", "twice", "twice-1"]


def build(out, *flags):
    from experiments.site import __main__ as main

    command.run(
        main.main, main.Config, name="experiments.site", doc=None, args=["--out", str(out), *flags]
    )


@pytest.mark.slow
def test_the_site_builds(tmp_path, capsys):
    """With the stored outputs of the notebooks."""
    for module in ("pdoc", "nbconvert", "markdown_it"):
        pytest.importorskip(module)
    build(tmp_path / "site", "--no-execute")
    assert "no dead link" in capsys.readouterr().out
    root = tmp_path / "site"
    for path in ROOT.glob("fmjax/**/*.py"):
        module = path.relative_to(ROOT).with_suffix("")
        page = module.parent if path.name == "__init__.py" else module
        assert (root / "api" / page.with_suffix(".html")).is_file(), module
    api = (root / "api/fmjax.html").read_text()
    import fmjax as fm

    for name in vars(fm):
        if name[0] != "_" and name not in sys.modules and f"fmjax.{name}" not in sys.modules:
            assert f"#{name}" in api, name
    assert "Alias for field" not in (root / "api/fmjax/types.html").read_text()
    for path in ROOT.glob("experiments/notebooks/*.ipynb"):
        page = (root / "notebooks" / f"{path.stem}.html").read_text()
        assert page.count("data:image/png") == path.read_text().count('"image/png":'), path
        assert f'href="{path.stem}.html"' in (root / "notebooks/index.html").read_text()
    front = (root / "index.html").read_text()
    shown = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert shown and all(f'src="{picture}"' in front for picture in shown)

    (root / "index.html").write_text("old")  # a second one replaces the first, and nothing else
    build(root, "--no-execute")
    assert (root / "index.html").read_text() == front
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        build(tmp_path, "--no-execute")
    assert "holds other files, which stay" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


@pytest.mark.slow
def test_a_notebook_is_run_from_the_root_of_the_repository():
    """What the site does to each; `test_readme` runs all of them."""
    pytest.importorskip("nbconvert")
    from experiments.site import notebooks

    cell = nbformat.v4.new_code_cell("import pathlib; print(pathlib.Path.cwd())")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebooks.run(notebook)
    assert notebook.cells[0].outputs[0].text == f"{ROOT}\n"
