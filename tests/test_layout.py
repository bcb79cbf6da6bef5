"""The rules of the house, as tests: who may import whom, how long a file may be, and that DVC
knows every module whose change must rerun a stage.
"""

import ast
from pathlib import Path

import pytest
import yaml

from pipeline.core.config import SECTIONS
from pipeline.core.presets import PRESETS

ROOT = Path(__file__).parents[1]
FLOORS = ["core", "data", "models", "training", "evaluation"]
STAGES = list(SECTIONS)
MODULES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")])
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def imported(path: Path) -> set[Path]:
    """Project files that a file imports, wherever in it, packages on the way included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in ("pipeline", "stages"):
            for i in range(1, len(parts) + 1):
                stem = ROOT.joinpath(*parts[:i])
                found |= {p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()}
    return found - {ROOT / "pipeline/__init__.py"}  # which only forwards a name


def import_closure(path: Path) -> set[Path]:
    closure, todo = set(), [path]
    while todo:
        if (current := todo.pop()) not in closure:
            closure.add(current)
            todo += imported(current)
    return closure


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_depends_on_every_module_that_a_stage_imports(stage):
    code = {ROOT / dep for dep in DVC[stage]["deps"] if dep.endswith(".py")}
    closure = import_closure(ROOT / f"stages/{stage}.py")
    needed = {path for path in closure if path.read_text().strip()}  # empty __init__ decide nothing
    assert code == needed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_is_longer_than_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("floor", FLOORS)
def test_floors_import_downwards_only(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in ROOT.glob(f"pipeline/{floor}/**/*.py"):
        rooms = {p.relative_to(ROOT).parts[1] for p in imported(path) if "stages" not in p.parts}
        assert not rooms & {*above, "cli.py"}, path
        assert not any("stages" in p.relative_to(ROOT).parts for p in imported(path)), path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_never_imports_another(stage):
    others = {ROOT / f"stages/{other}.py" for other in STAGES if other != stage}
    assert not import_closure(ROOT / f"stages/{stage}.py") & others


def test_training_reads_no_teacher_module():
    closure = import_closure(ROOT / "stages/distill.py")
    assert ROOT / "pipeline/models/teacher.py" not in closure
    for path in closure:
        assert "open_clip" not in {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }, path


def test_one_word_per_room():
    """A stage is a module with one public function of its name, a section, a command, an out."""
    assert list(DVC) == STAGES
    for stage in STAGES:
        tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
        public = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        assert public == [stage]
        assert DVC[stage]["cmd"] == f"pipeline {stage.replace('_', '-')}"
        assert stage in DVC[stage]["params"]


def test_the_repository_starts_with_the_demo_preset():
    assert (ROOT / "params.yaml").read_text() == (
        ROOT / "pipeline/core/presets/demo.yaml"
    ).read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    from pipeline.core.config import load_section

    for section in SECTIONS:
        load_section(ROOT / f"pipeline/core/presets/{preset}.yaml", section)
