"""The API from the docstrings: a page for every module of fmjax, made by pdoc.

A package documents nothing twice: its page lists the names that it hands on, each linked to the
module that defines it.
"""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import typing
import warnings
from typing import Any, NamedTuple

import pdoc
import pdoc.doc
import pdoc.render
import pdoc.render_helpers
import pdoc.search

TEMPLATES = pathlib.Path(__file__).parent / "templates"
# What jax.typing.DTypeLike is spelt out as, perhaps with None.
_DTYPE = r"Union\[str, type\[Any\], numpy\.dtype, jax\._src\.typing\.SupportsDType(, NoneType)?\]"


class Name(NamedTuple):
    """A row of a package's table: a name, where its documentation is, and its first sentence."""

    name: str
    link: str
    summary: str


def configure() -> None:
    """Sets pdoc up: our templates, Google's style of docstrings."""
    pdoc.render.configure(docformat="google", template_directory=TEMPLATES)
    pdoc.render.env.globals |= {f.__name__: f for f in (names, rooms, is_shown, is_stock)}
    pdoc.render.env.filters |= {f.__name__: f for f in (format_signature, in_public)}
    # The search index takes no filter.
    pdoc.search.format_signature = format_signature  # pyright: ignore[reportPrivateImportUsage]


def write(out: pathlib.Path) -> int:
    """Writes a page for every module of fmjax.

    Returns:
      The number of pages.
    """
    with warnings.catch_warnings():
        # A TypedDict keeps no trace of the one that it extends; the fields are shown all the same.
        warnings.filterwarnings("ignore", r"Cannot determine where fmjax\.\S+Options\.\w+ is")
        pdoc.pdoc("fmjax", output_directory=out)
    return len(modules())


def modules() -> list[str]:
    """The names of all modules of fmjax."""
    found = pkgutil.walk_packages(importlib.import_module("fmjax").__path__, "fmjax.")
    return ["fmjax", *(module.name for module in found)]


def names(module: pdoc.doc.Module) -> list[Name]:
    """The public names that a package hands on.

    Raises:
      ValueError: if one of them has no documentation in the module that defines it.
    """
    rows = []
    for name, source in _handed_on(module.modulename).items():
        defined = pdoc.doc.Module(importlib.import_module(_definition(source, name)))
        doc = defined.get(name)
        if doc is None or not doc.docstring:
            raise ValueError(f"{defined.modulename}.{name} is public and needs a docstring.")
        page = pdoc.render_helpers.relative_link(module.modulename, defined.modulename)
        rows.append(Name(name, f"{page}#{name}", _summary(doc)))
    return rows


def rooms(module: pdoc.doc.Module) -> list[Name]:
    """The modules of a package, with the first sentences of their docstrings."""
    return [
        Name(
            child.name,
            pdoc.render_helpers.relative_link(module.modulename, child.modulename),
            _summary(child),
        )
        for child in module.submodules
    ]


def is_shown(doc: pdoc.doc.Doc[Any]) -> bool:
    """Whether a member is worth its place beside what the docstring of its class says.

    Not shown: what a base of another library hands down, the fields that stand under "Attributes"
    (but for a TypedDict, whose fields no signature shows), and how a Protocol would be constructed.
    """
    if doc.name == "__init__":
        return "*args" not in str(getattr(doc, "signature", ""))
    owner = _owner(doc)
    if owner is None or typing.is_typeddict(owner):
        return True
    if doc.name in getattr(owner, "__annotations__", {}) or doc.kind == "variable":
        return "Attributes:" not in (owner.__doc__ or "")
    return doc.taken_from[0].startswith("fmjax")


def is_stock(doc: pdoc.doc.Doc[Any]) -> bool:
    """Whether a docstring is Python's own, which says nothing."""
    return doc.docstring.startswith(("Create new instance of ", "Call self as a function."))


def format_signature(signature: inspect.Signature, colon: bool) -> str:
    """pdoc's filter, with the names that other libraries' classes have in public."""
    shown = signature.replace(
        parameters=[_written(p) for p in signature.parameters.values() if not _is_flax(p)],
        return_annotation=_annotation(signature.return_annotation),
    )
    return pdoc.render_helpers.format_signature(shown, colon)


def in_public(text: str) -> str:
    """Annotations as they are written: jax.Array for jax.jaxlib._jax.Array."""

    def public(match: re.Match[str]) -> str:
        package, name = match[1], match[2]
        return f"{package}.{name}" if hasattr(sys.modules.get(package), name) else match[0]

    text = re.sub(_DTYPE, lambda m: "DTypeLike" + (" | None" if m[1] else ""), text)
    text = re.sub(r"\*<class '([\w.]+)'>", r"Unpack[\1]", text)
    return re.sub(r"\b(\w+)(?:\.\w+)*\._\w+(?:\.\w+)*\.(\w+)", public, text)


class _Text(str):
    """An annotation or a default that is shown as it is."""

    __repr__ = str.__str__


def _written(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if callable(default) and default is not inspect.Parameter.empty:
        default = _Text(getattr(default, "__name__", repr(default)))
    return parameter.replace(annotation=_annotation(parameter.annotation), default=default)


def _annotation(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    return _Text(in_public(inspect.formatannotation(annotation)))


def _is_flax(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is one that every Flax module has: parent, and name."""
    text = inspect.formatannotation(parameter.annotation)
    return "flax.linen" in text or (parameter.name == "name" and text == "Optional[str]")


def _owner(doc: pdoc.doc.Doc[Any]) -> type | None:
    """The class that a member is one of."""
    owner = sys.modules[doc.modulename]
    for part in doc.qualname.split(".")[:-1]:
        owner = getattr(owner, part)
    return owner if isinstance(owner, type) else None


def _summary(doc: pdoc.doc.Doc[Any]) -> str:
    return " ".join(doc.docstring.split("\n\n")[0].split())


def _handed_on(package: str) -> dict[str, str]:
    """Names that a package's __init__ imports `as` themselves, and from which module."""
    module = importlib.import_module(package)
    if not hasattr(module, "__path__"):
        return {}
    return {
        alias.name: f"{package}.{node.module}"
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if alias.asname == alias.name
    }


def _definition(module: str, name: str) -> str:
    """The module that defines a name which `module` defines or hands on."""
    source = _handed_on(module).get(name)
    return _definition(source, name) if source else module
