"""Imports point downwards, and weight files are opened in one place. Read from the source text, nothing is run."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import transmla

PACKAGE = Path(transmla.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WEIGHT_LIBRARIES = {"safetensors", "gguf", "pickle", "zipfile"}


def imported(module: str) -> set[str]:
    """Full names of what a module imports anywhere, and of torch.load."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.add(ast.unparse(node))
    return found


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def within(names: set[str], *allowed: str) -> bool:
    return all(any(name == part or name.startswith(f"{part}.") for part in allowed) for name in names)


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "transmla"}


# From the ground up: a room imports what is on floors below its own, and what is on its own floor only of itself.
FLOORS = (
    ("errors", "progress", "tables"),
    ("extras",),
    ("settings",),
    ("families", "geometry", "layouts", "recipe"),
    ("maths", "devices"),
    ("processes", "checkpoint"),
    ("text",),
    ("train",),
    ("model",),
    ("targets",),
    ("serving",),
    ("evaluation",),
    ("conversion",),
    ("healing",),
    ("cli",),
)
# the package's front door, `python -m transmla` and `-m transmla.heal`, and folders of data
DOORS = ("transmla", "transmla.__main__", "transmla.heal", "transmla.recipes", "transmla.suites", "transmla.data")


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def climbs(module: str) -> set[str]:
    """What a module imports from a floor above its own, or from another room on its floor."""
    here = floor_of(module)
    others = {name for name in own(imported(module)) if name not in DOORS and name.partition(".data")[0] != "transmla"}
    return {
        name
        for name in others
        if floor_of(name) > here or (floor_of(name) == here and name.split(".")[1] != module.split(".")[1])
    }


@pytest.mark.parametrize("module", [module for module in MODULES if not within({module}, *DOORS[1:])][1:])
def test_imports_point_downwards(module: str) -> None:
    assert not climbs(module), f"{module} climbs to {climbs(module)}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("transmla.maths")])
def test_maths_knows_torch_alone(module: str) -> None:
    names = imported(module)
    assert top(names) <= {"torch", "transmla"} and within(own(names), "transmla.maths")


@pytest.mark.parametrize("module", ["families", "geometry", "layouts", "errors", "recipe", "settings"])
def test_tables_need_the_standard_library_only(module: str) -> None:
    names = imported(f"transmla.{module}")
    parts = ("families", "geometry", "errors", "recipe", "recipes", "settings")
    assert top(names) <= {"transmla"} and within(own(names), *(f"transmla.{part}" for part in parts))


def test_the_file_inside_checkpoints_stands_alone() -> None:
    names = imported("transmla.model.modeling_transmla")
    assert own(names) == set() and top(names) == {"torch", "transformers"}


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if module not in ("transmla.__main__", "transmla.heal") and not module.startswith("transmla.cli")
    ],
)
def test_nobody_imports_the_command_line(module: str) -> None:
    names = imported(module)
    assert not any(name.startswith("transmla.cli") for name in names)
    assert "transmla.maths.reference" not in names, "the reference is for tests"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("transmla.checkpoint")])
def test_weight_files_are_opened_in_one_place(module: str) -> None:
    names = imported(module)
    assert not top(names) & WEIGHT_LIBRARIES and not names & {"pickle", "zipfile", "torch.load", "torch.save"}


def test_these_checks_can_fail() -> None:
    assert "safetensors" in top(imported("transmla.checkpoint.write"))
    assert "torch.load" in imported("transmla.checkpoint.bin_file")
    assert not within({"transmla.maths", "transmla.model.source"}, "transmla.maths")
    assert not within({"transmla.mathsmore"}, "transmla.maths")
    assert floor_of("transmla.cli.convert") > floor_of("transmla.conversion.flow") > floor_of("transmla.maths.fold")


def test_packages_are_the_folders() -> None:
    """Every folder of modules or data is named in pyproject.toml, so that wheels hold it."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {".".join(path.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("*") if _is_package(path)}
    assert set(settings["packages"]) == folders | {"transmla"} | set(settings["package-dir"])
    for name, folder in settings["package-dir"].items():
        assert name.startswith("transmla.") and (PACKAGE.parent / folder).is_dir()


def _is_package(path: Path) -> bool:
    return path.is_dir() and path.name != "__pycache__"
