"""The direction of imports: models and judges see nobody, rewards sees both, pipeline sees all."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
MAY_SEE = {
    "models": {"models"},
    "judges": {"judges"},
    "rewards": {"rewards", "judges", "models"},
    "pipeline": {"pipeline", "rewards", "judges", "models"},
}
FILES = [path for package in MAY_SEE for path in sorted((HOME / package).rglob("*.py"))]


def module(path: Path) -> str:
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES or {node.module}
    return {name for name in found if name.partition(".")[0] in MAY_SEE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_only_what_is_below_is_imported(path):
    allowed = MAY_SEE[path.relative_to(HOME).parts[0]]
    assert {name.partition(".")[0] for name in imported(path)} <= allowed


def test_no_file_is_part_of_a_circle():
    graph = {module(path): imported(path) & MODULES for path in FILES}
    assert set(TopologicalSorter(graph).static_order()) == MODULES


def test_every_package_is_listed_for_installation():
    text = (HOME / "pyproject.toml").read_text()
    packages = {module(path) for path in FILES if path.name == "__init__.py"}
    assert {name for name in packages if f'"{name}"' not in text} == set()


def test_a_misspelt_setting_does_not_wait_for_the_models():
    """What the settings of every stage are made of must not bring in what only their work needs."""
    asked = "import sys, pipeline.config; print(*({'transformers', 'trl', 'peft', 'diffusers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", asked], cwd=HOME, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == []
