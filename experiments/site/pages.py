"""Pages from the repository's Markdown: whatever a page links to becomes part of the site.

README.md becomes index.html, as the README of every folder does. From there links are followed: a
Markdown file becomes a page, source code a page of its own, a picture is copied, a notebook is one
of `notebooks`. Paths in the site are those in the repository.
"""

import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import markdown_it
import markdown_it.token
import pygments
import pygments.formatters
import pygments.lexers
import pygments.util

ROOT = pathlib.Path(__file__).parents[2]
COPIED = {".png", ".jpg", ".svg", ".gif"}


class Heading(NamedTuple):
    """A heading: 1 is the title; its text; its anchor."""

    level: int
    text: str
    anchor: str


class Page(NamedTuple):
    """A Markdown file as HTML.

    Attributes:
      body: the HTML, without a frame.
      headings: in order.
      links: files of the repository that the page refers to.
    """

    body: str
    headings: list[Heading]
    links: list[pathlib.Path]


Render = Callable[..., str]  # (template, root, **context) -> a whole page


def write(out: pathlib.Path, render: Render, others: Sequence[pathlib.Path] = ()) -> int:
    """Writes the front page and all that can be reached from it by links.

    Args:
      out: folder of the site.
      render: puts a body into the site's frame.
      others: files that other pages link to.

    Returns:
      The number of pages.

    Raises:
      ValueError: if a link leads nowhere, naming page and link.
    """
    todo, done = [ROOT / "README.md", *others], set()
    while todo:
        path = todo.pop()
        if path in done or path.suffix == ".ipynb":  # `notebooks` writes these
            continue
        done.add(path)
        place = out / location(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in COPIED:
            shutil.copyfile(path, place)
        elif path.suffix == ".md":
            page = read_markdown(path)
            todo += page.links
            title = next((h.text for h in page.headings if h.level == 1), path.stem)
            place.write_text(
                render(place.relative_to(out), title=title, body=page.body, headings=page.headings)
            )
        else:
            name = path.relative_to(ROOT).as_posix()
            body = f"<h1>{name}</h1>\n{highlight(path.read_text(), path.name)}"
            place.write_text(render(place.relative_to(out), title=name, body=body, headings=[]))
    return sum(path.suffix not in COPIED for path in done)


def location(path: pathlib.Path) -> pathlib.Path:
    """Where in the site a file of the repository is, relative to the site's folder."""
    relative = path.relative_to(ROOT)
    if path.suffix == ".ipynb":
        return pathlib.Path("notebooks", relative.stem + ".html")
    if path.name == "README.md":
        return relative.with_name("index.html")
    if path.suffix == ".md":
        return relative.with_suffix(".html")
    return relative if path.suffix in COPIED else relative.with_name(relative.name + ".html")


def read_markdown(path: pathlib.Path) -> Page:
    """A Markdown file of the repository, its links made the site's."""
    parser = markdown_it.MarkdownIt("commonmark", {"html": True, "highlight": _fenced})
    parser.enable("table")
    tokens = parser.parse(path.read_text())
    headings, links = _anchor_headings(tokens), []
    for token in _flat(tokens):
        for name in ("href", "src"):
            link = token.attrGet(name)
            if isinstance(link, str) and (target := follow(link, path)):
                links.append(target)
                token.attrSet(name, relative(link, target, path))
    return Page(parser.renderer.render(tokens, parser.options, {}), headings, links)


def follow(link: str, path: pathlib.Path) -> pathlib.Path | None:
    """The file that a link in the file `path` means; None for another site, or this very page.

    Raises:
      ValueError: if there is no such file in the repository.
    """
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
    if target.is_dir():
        target /= "README.md"
    if not target.is_relative_to(ROOT) or not target.is_file():
        raise ValueError(f"{path.relative_to(ROOT)} links to {link}, which is no file of ours.")
    return target


def relative(link: str, target: pathlib.Path, path: pathlib.Path) -> str:
    """The link from the page of the file `path` to that of `target`, its anchor kept."""
    to = os.path.relpath(location(target), location(path).parent)
    fragment = urllib.parse.urlsplit(link).fragment
    return f"{pathlib.Path(to).as_posix()}{'#' + fragment if fragment else ''}"


def highlight(code: str, name: str, *, nowrap: bool = False) -> str:
    """Source code as HTML, by the name of its file or of its language."""
    try:
        lexer = pygments.lexers.find_lexer_class_for_filename(name)
        lexer = lexer() if lexer else pygments.lexers.get_lexer_by_name(name)
    except pygments.util.ClassNotFound:
        lexer = pygments.lexers.get_lexer_by_name("text")
    return pygments.highlight(code, lexer, pygments.formatters.HtmlFormatter(nowrap=nowrap))


def _fenced(code: str, language: str, _: str) -> str:
    body = highlight(code.rstrip(), language or "text", nowrap=True)
    return f'<pre class="highlight"><code>{body}</code></pre>'


def _flat(tokens: Sequence[markdown_it.token.Token]) -> list[markdown_it.token.Token]:
    return [found for token in tokens for found in (token, *_flat(token.children or []))]


def _anchor_headings(tokens: Sequence[markdown_it.token.Token]) -> list[Heading]:
    """Gives headings the anchors that GitHub gives them: those of one text are numbered."""
    headings: list[Heading] = []
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(t.content for t in inline.children or [])
            slug = re.sub(r"[^\w -]", "", text).lower().replace(" ", "-")
            before = sum(h.text == text for h in headings)
            anchor = f"{slug}-{before}" if before else slug
            opening.attrSet("id", anchor)
            headings.append(Heading(int(opening.tag[1:]), text, anchor))
    return headings
