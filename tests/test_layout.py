"""The rules of the house, as tests: who may import whom, how long a file may be, and that DVC
knows every module whose change must rerun a stage.
"""

import ast
import importlib
import multiprocessing
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.core.choices import Preset
from pipeline.core.config import SECTIONS

ROOT = Path(__file__).parents[1]
LAYERS = {  # layer -> layers that it may import
    "core": [],
    "cluster": ["core"],
    "data": ["core"],
    "fetch": ["core", "data"],
    "models": ["core", "data"],
    "training": ["core", "data", "models"],
    "evaluation": ["core", "data", "models", "training"],
    "verify": ["core", "data", "fetch", "models", "evaluation"],
    "explore": ["core", "data", "fetch", "models", "training", "evaluation"],
}
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
def test_dvc_depends_on_every_package_that_a_stage_imports(stage):
    code = {dep for dep in DVC[stage]["deps"] if dep.startswith(("pipeline/", "stages/"))}
    needed = {f"stages/{stage}.py"}
    for path in import_closure(ROOT / f"stages/{stage}.py"):
        parts = path.relative_to(ROOT).parts
        needed |= {"/".join(parts[:2])} if len(parts) > 2 and path.read_text().strip() else set()
    assert code == needed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_a_file_is_one_module(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_downwards_only(layer):
    for path in ROOT.glob(f"pipeline/{layer}/**/*.py"):
        found = {p.relative_to(ROOT).parts[:2] for p in imported(path)}
        layers = {parts[1] for parts in found if parts[0] == "pipeline"}
        assert layers <= {layer, *LAYERS[layer]}, path
        assert not any(parts[0] == "stages" for parts in found), path


def test_every_package_is_a_layer():
    assert {p.parent.name for p in ROOT.glob("pipeline/*/__init__.py")} == set(LAYERS)


def test_every_module_imports_alone():
    """Each in a fresh process, so in any order; only third parties are loaded before."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES]
    names = [name.removesuffix(".__init__") for name in names]
    context = multiprocessing.get_context("forkserver")
    third_parties = ["pyarrow.dataset", "duckdb", "matplotlib.pyplot", "pydantic", "pytest"]
    context.set_forkserver_preload([*third_parties, "pipeline.models.open_clip"])  # for its own
    with context.Pool(2, maxtasksperchild=1) as pool:
        errors = pool.map(import_error, names, chunksize=1)
    assert {name: e for name, e in zip(names, errors, strict=True) if e} == {}


def import_error(name: str) -> str | None:
    """Runs in a child that has imported none of our packages but this test's few."""
    for module in [m for m in sys.modules if m.split(".")[0] in ("pipeline", "stages")]:
        del sys.modules[module]
    try:
        importlib.import_module(name)
    except Exception as error:
        return repr(error)
    return None


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


def test_one_word_per_stage():
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


@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_preset_is_valid(preset):
    from pipeline.core.config import load_section

    for section in SECTIONS:
        load_section(ROOT / f"pipeline/core/presets/{preset}.yaml", section)


def test_no_benchmark_imports_another():
    """What several of them share stands in modules that are no programs."""
    texts = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    programs = {name for name, text in texts.items() if '__name__ == "__main__"' in text}
    assert programs and programs != texts.keys()
    for name, text in texts.items():
        nodes = list(ast.walk(ast.parse(text)))
        named = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not programs & named, name
