"""Which links of a folder of HTML pages lead nowhere: files, and anchors in them.

Links to other sites are not followed. A link that begins with / is dead: it leaves the site as soon
as that is served from a folder of a host, or opened from a disk.
"""

import html.parser
import pathlib
import re
import urllib.parse
from typing import NamedTuple


class Page(NamedTuple):
    """What a page names and what it refers to.

    Attributes:
      anchors: ids, and names of anchors.
      links: the values of all href and src, and where a refresh goes.
    """

    anchors: frozenset[str]
    links: tuple[str, ...]


def read_page(text: str) -> Page:
    """The anchors and links of a page's HTML."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return Page(frozenset(reader.anchors), tuple(reader.links))


def dead_links(root: pathlib.Path) -> list[str]:
    """One line for each link of a page under `root` that leads nowhere: the page, link and reason.

    Args:
      root: the folder of the site; every `*.html` in it is read.

    Returns:
      "PAGE: LINK (why)", in order of pages; empty where all links are good.
    """
    root = root.resolve()
    pages = {path: read_page(path.read_text()) for path in sorted(root.rglob("*.html"))}
    return [
        f"{path.relative_to(root)}: {link} ({why})"
        for path, page in pages.items()
        for link in dict.fromkeys(page.links)
        if (why := _why_dead(link, path, root, pages))
    ]


def _why_dead(
    link: str, path: pathlib.Path, root: pathlib.Path, pages: dict[pathlib.Path, Page]
) -> str | None:
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    if parts.path.startswith("/"):
        return "begins with /"
    target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target = target / "index.html"
    if not target.is_relative_to(root):
        return "leaves the site"
    if not target.is_file():
        return "no such file"
    anchor = urllib.parse.unquote(parts.fragment)
    if anchor and (target not in pages or anchor not in pages[target].anchors):
        return "no such anchor"
    return None


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        marks = ("id", "name") if tag == "a" else ("id",)
        self.anchors |= {values[name] for name in marks if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]
        if values.get("http-equiv", "").lower() == "refresh":
            self.links += re.findall(r"url=(.+)", values.get("content", ""))
