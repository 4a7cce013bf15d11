"""Which room imports which, what `import fmjax` loads, and that every public name is documented."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fmjax as fm

ROOT = Path(__file__).parents[2]

# Every room and the rooms that it imports, no more and no fewer: an arrow that is not here is a
# change of the floor plan; add it only if it points down.
ARROWS = {
    "types": set(),
    "files": set(),
    "times": {"types"},
    "losses": {"types"},
    "guidance": {"types"},
    "sources": {"types"},
    "paths": {"types"},
    "couplings": {"types"},
    "solve": {"sources", "types"},
    "flow_maps": {"couplings", "paths", "solve", "times", "types"},
    "models": {"types"},
    "weights": {"files", "types"},
    "inference": {"types"},
    "data": {"files", "types"},
    "training": {"files", "types"},
    "metrics": {"files", "weights"},
    "plotting": {"files"},
    "harness": {"data", "files", "guidance", "plotting", "sources", "training", "types"},
    "evaluation": {
        "data",
        "files",
        "harness",
        "metrics",
        "plotting",
        "sources",
        "training",
        "weights",
    },
    "tasks": {
        "data",
        "evaluation",
        "flow_maps",
        "harness",
        "inference",
        "metrics",
        "models",
        "plotting",
        "sources",
        "training",
    },
    "cli": {"harness"},  # and by name the commands of evaluation and data
}
CORE = {"couplings", "guidance", "losses", "paths", "solve", "sources", "times", "types"}
ARROWS["fmjax"] = CORE  # fmjax/__init__.py hands the core's names on and nothing else
EXPERIMENTS = {
    "experiments": {
        "data",
        "evaluation",
        "flow_maps",
        "harness",
        "metrics",
        "models",
        "plotting",
        "tasks",
        "training",
    },
    "experiments.benchmarks": {
        "experiments",
        "couplings",
        "data",
        "evaluation",
        "harness",
        "models",
        "plotting",
        "solve",
        "tasks",
        "training",
    },
}
HEAVY = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "ott")
LATE = {"fmjax.couplings.plans": {"ott"}}  # inside a function, where it is used
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("fmjax", "experiments")
    for path in sorted((ROOT / top).rglob("*.py"))
}
PUBLIC = sorted(
    name for name, value in vars(fm).items() if name[0] != "_" and not inspect.ismodule(value)
)


def imports(module: str) -> set[str]:
    """The absolute names that a module imports, at its top or inside a function."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                up = parts[: len(parts) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            # `from package import name`: the name may be a module of its own.
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def arrows(module: str) -> set[str]:
    """The modules of this repository that a module imports."""
    found = imports(module) & MODULES.keys()
    # A package on the way to a module is no arrow itself.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def room(module: str) -> str:
    top, *rest = module.split(".")
    if top == "experiments":
        return "experiments.benchmarks" if rest[:1] == ["benchmarks"] else top
    return rest[0] if rest else top


def rooms(table: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that there are between the rooms of a table and any others."""
    found = {name: set() for name in table}
    for module in MODULES:
        if room(module) in table:
            found[room(module)] |= {room(other) for other in arrows(module)} - {room(module)}
    return found


@pytest.mark.parametrize("table", [ARROWS, EXPERIMENTS], ids=["fmjax", "experiments"])
def test_the_arrows_are_those_of_the_table(table):
    assert {room(module) for module in MODULES} == ARROWS.keys() | EXPERIMENTS.keys()
    assert rooms(table) == table


@pytest.mark.parametrize("graph", [ARROWS, {m: arrows(m) - {m} for m in MODULES}], ids=len)
def test_there_is_no_circle(graph):
    done: set[str] = set()
    while left := graph.keys() - done:
        free = {name for name in left if graph[name] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


def test_no_file_is_its_neighbours_private_twin():
    assert not [name for name in MODULES if re.search(r"\._(?!_main__)", name)]


def test_no_message_of_the_library_names_a_flag_or_a_command_of_the_experiments():
    for module, path in MODULES.items():
        if module.startswith("fmjax.") and module != "fmjax.data.prepare":  # a command of its own
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.search(r"\bexperiments[./]\w", node.value), (module, node.value)
                    if room(module) in ("harness", "evaluation", "tasks", "cli"):  # they make flags
                        continue
                    flags = re.findall(r"--(?!file_format|data_dir)[a-z]\w+", node.value)
                    assert not flags, (module, flags)


def test_the_core_loads_nothing_heavy():
    for module in MODULES:
        if room(module) in CORE | {"fmjax"}:
            roots = {name.split(".")[0] for name in imports(module)}
            assert not roots & ({*HEAVY, "PIL", "sklearn"} - LATE.get(module, set())), module
    code = f"import sys, fmjax; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_from_the_core():
    assert len(PUBLIC) > 30
    assert {room(getattr(fm, name).__module__) for name in PUBLIC} <= CORE


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    value = getattr(fm, name)
    # The class's own: a NamedTuple without one has the signature that Python writes.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and len(doc.split()) >= 5 and not doc.startswith(f"{name}(")


def test_every_public_name_stands_in_the_list_of_the_rooms():
    names = ROOT / "fmjax" / "README.md"
    table = [line for line in names.read_text().splitlines() if line[:1] == "|"]
    missing = [n for n in PUBLIC if not any(re.search(rf"`{n}\b", line) for line in table)]
    assert not missing


# What they solve takes longer to compile than all others.
SLOW = ("fmjax.solve.each", "fmjax.couplings.plans", "fmjax.couplings.unbalanced")
EXAMPLES = [m for m in MODULES if ">>>" in MODULES[m].read_text()]


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in EXAMPLES]
)
def test_docstring_examples_run(module):
    """By their module's own names alone, as `python -m doctest` runs them."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    done = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert not done.failed


def test_the_version_is_the_packages():
    assert fm.__version__ == importlib.metadata.version("fmjax")
