"""Imports of crop go one way, type-only ones and those inside functions included; files stay readable in one sitting."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.glob("crop/**/*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
LAYERS = (
    ("backend",),
    ("geometry",),
    ("ops",),
    ("methods", "models"),
    ("patching",),
    ("localizers", "cost"),
    ("integrations", "cli"),
)
EXEMPT = ("crop", "crop.__main__")  # the public names; the command line's door
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
ALLOWED = {  # what stands beside the layers, or reaches across them
    "embedded": {"geometry"},
    "selftest": {"geometry", "ops"},
    "integrations": {"", "cli"},  # "": the public names
    "cli": {"", "embedded", "integrations", "selftest"},
    "baselines": {"methods"},
    "reference": {"ops"},
}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> set[str]:
    """Modules of crop that a module names in an import statement, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports must be absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner | ({node.module} if len(inner) < len(node.names) else set())
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in EXEMPT])
def test_layers(module):
    """A package imports nothing of one above it or beside it."""
    mine = package_of(module)
    below = {package for package, level in LEVEL.items() if mine in LEVEL and level < LEVEL[mine]}
    allowed = below | {mine} | ALLOWED.get(mine, set())
    wrong = {name for name in imports_of(module) if package_of(name) not in allowed}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_no_circle():
    TopologicalSorter({name: imports_of(name) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize("folder", ["crop", "tests", "bench"])
def test_files_have_at_most_400_lines(folder):
    long = {str(path.relative_to(ROOT)): count for path in ROOT.glob(f"{folder}/**/*.py")
            if (count := len(path.read_text().splitlines())) > 400}  # fmt: skip
    assert not long
