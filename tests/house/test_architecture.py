"""Who may import whom, what `import fmjax` loads, and that every public name is documented."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import pytest

import fmjax as fm

ROOT = Path(__file__).parents[2]

# Every module and the fmjax modules that it may import. A module or an arrow that is not here is
# a change of the floor plan: add it only if it points down.
ARROWS = {
    "types": set(),
    "_affine": {"types"},
    "paths": {"_affine", "types"},
    "assignment": set(),
    "couplings": {"assignment", "types"},
    "times": {"types"},
    "losses": {"types"},
    "guidance": {"types"},
    "_solve": {"types"},
    "sampling": {"_solve", "types"},
    "divergences": {"types"},
    "likelihood": {"_solve", "divergences", "types"},
    "_lanes": {"_solve"},
    "lanes": {"_lanes", "_solve", "divergences", "likelihood", "types"},
    "models": {"models.mlp", "models.unet"},
    "models.kernels": {"types"},
    "models.layers": {"models.kernels"},
    "models.mlp": {"models.layers", "types"},
    "models.unet": {"models.kernels", "models.layers", "types"},
    "models.cpu": {"models.kernels"}
    | {f"models.cpu.{name}" for name in ("attention", "upsampling", "winograd")},
    "models.cpu.attention": {"models.kernels"},
    "models.cpu.upsampling": {"models.cpu.winograd", "models.kernels"},
    "models.cpu.winograd": set(),
    "metrics": {"metrics.estimate", "metrics.frechet", "metrics.kernel", "metrics.scores"}
    | {"metrics.transport"},
    "metrics.estimate": set(),
    "metrics.frechet": {"metrics.estimate"},
    "metrics.kernel": {"metrics.estimate"},
    "metrics.scores": {"metrics.estimate"},
    "metrics.transport": {"metrics.estimate"},
    "metrics.inception": {"metrics.state_dicts"},
    "metrics.resnet": {"metrics.state_dicts"},
    "metrics.resize": set(),
    "metrics.state_dicts": set(),
    "metrics.torch_files": set(),
    "metrics.encoders": {"metrics.inception", "metrics.resize", "metrics.resnet"}
    | {"metrics.torch_files", "digests"},
    "training": {"types"},
    "sharding": {"training"},
    "digests": set(),
    "files": set(),
    "stored": {"digests"},
    "checkpoints": {"digests", "stored", "training"},
    "data": {"_splits", "archives", "prepare", "types"},
    "_splits": set(),
    "pixels": {"types"},
    "dequantization": {"pixels", "types"},
    "prepare": {"archives"},
    "archives": {"digests", "files"},
}
CORE = ("types", "paths", "couplings", "times", "losses", "guidance", "sampling")
CORE += ("divergences", "likelihood", "lanes")
ARROWS[""] = set(CORE)  # fmjax/__init__.py re-exports the core and nothing else
HEAVY = ("flax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "ott")

FILES = {
    ".".join(path.relative_to(ROOT / "fmjax").with_suffix("").parts)
    .removesuffix("__init__")
    .removesuffix("."): path
    for path in sorted((ROOT / "fmjax").rglob("*.py"))
}
PUBLIC = sorted(
    name for name, value in vars(fm).items() if name[0] != "_" and not inspect.ismodule(value)
)


def imports(path: Path, package: str) -> set[str]:
    """The absolute names of the modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            # `from package import name`: the name may be a module of its own.
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def arrows(module: str) -> set[str]:
    path = FILES[module]
    dotted = ["fmjax", *module.split(".")] if module else ["fmjax"]
    package = ".".join(dotted if path.name == "__init__.py" else dotted[:-1])
    found = set()
    for name in imports(path, package):
        if name == "fmjax" or name.startswith("fmjax."):
            found.add(name.removeprefix("fmjax").removeprefix("."))
    # What is no module is a name in one; a package on the way to a module is no arrow itself.
    modules = {name for name in found if name in FILES}
    return {m for m in modules if not any(n.startswith(f"{m}.") or (not m and n) for n in modules)}


def test_every_module_is_on_the_floor_plan():
    assert set(FILES) <= set(ARROWS), "a module without a row in ARROWS"


@pytest.mark.parametrize("module", FILES)
def test_arrows_go_down_only(module):
    assert arrows(module) <= ARROWS[module]


def test_the_table_has_no_circle():
    done: set[str] = set()
    while left := set(ARROWS) - done:
        free = {module for module in left if ARROWS[module] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_experiments_or_tests(module):
    roots = {name.split(".")[0] for name in imports(FILES[module], "fmjax")}
    assert not roots & {"experiments", "tests", "oracles"}
    if module in (*CORE, "_solve", ""):
        assert not roots & {*HEAVY, "PIL", "sklearn"}


def test_import_is_light():
    code = f"import sys, fmjax; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_from_the_core():
    assert len(PUBLIC) > 30
    for name in PUBLIC:
        assert getattr(fm, name).__module__ in {f"fmjax.{module}" for module in CORE}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    value = getattr(fm, name)
    # The class's own: a NamedTuple without one has the signature that Python writes.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and len(doc.split()) >= 5 and not doc.startswith(f"{name}(")


def test_every_public_name_stands_in_the_readme():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line[:1] == "|"]
    missing = [n for n in PUBLIC if not any(re.search(rf"`{n}\b", line) for line in table)]
    assert not missing


@pytest.mark.parametrize("module", ("checkpoints", "digests", "files", "stored"))
def test_docstring_examples_need_nothing_else(module):
    done = doctest.testmod(importlib.import_module(f"fmjax.{module}"))
    assert done.attempted and not done.failed


@pytest.mark.parametrize("module", (*CORE, "assignment", "dequantization"))
def test_docstring_examples_run(module):
    module = importlib.import_module(f"fmjax.{module}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder().find(
        module, extraglobs={"jax": jax, "jnp": jnp, "diffrax": diffrax}
    ):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
