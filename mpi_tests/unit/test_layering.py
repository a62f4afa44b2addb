"""Imports point down only, and neither Horovod nor mpi4py is needed."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvd_compress

PACKAGE = Path(hvd_compress.__file__).parent
MODULES = {
    ".".join(("hvd_compress", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the top. A layer may use itself only where it is a package, whose modules build on their base.
LAYERS = [
    {"__main__"},
    {"commands"},
    {"prediction"},
    {"hvd_compress"},
    {"compression", "ddp", "mpi", "local", "elastic", "optim", "activations"},
    {"mpi_optimizer", "bucket_exchange", "local_steps"},
    {"gradient_exchange", "followed_steps"},
    {"gradient_compression"},
    {"horovod_hooks"},
    {"session"},
    {"checkpoint"},
    {"recommendation"},
    {"agreement", "late", "step_check", "ordered_engine", "paced_engine", "adaptive", "disagreement", "by_name"},
    {"training"},
    {"binding", "fingerprint", "engine", "states", "facts", "connection", "routing"},
    {"transports"},
    {"topologies", "options"},
    {"compressors"},
    {"messages"},
    {"wire", "memory", "requests", "telemetry", "schedules"},
    {"kernels"},
    {"environment"},
    {"version", "anchor", "log", "calls", "launcher", "pictures"},
]
# Who may reach for the other side of a layer.
SIDEWAYS = {("mpi", "compression")}
COMMANDS = {"hvd_compress.commands.doctor", "hvd_compress.commands.training"}  # that a launcher starts
PACKAGES = {
    "commands",
    "prediction",
    "adaptive",
    "training",
    "transports",
    "topologies",
    "compressors",
    "telemetry",
    "kernels",
    "activations",
}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that `module` imports, in full, and whether only when a function is called."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, lazily: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazily) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - child.level + 1], *filter(None, [child.module])])
                base = base if child.level else str(child.module)
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield full if full in MODULES else base, lazily
            else:
                yield from visit(child, lazily or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    yield from visit(ast.parse(path.read_text()), False)


def part(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def depth(module: str) -> int:
    (found,) = (number for number, layer in enumerate(LAYERS) if part(module) in layer)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for imported, _ in imports(module):
        if not imported.startswith("hvd_compress"):
            continue
        here, there = part(module), part(imported)
        if here == there:
            assert here in PACKAGES
        elif (here, there) not in SIDEWAYS:
            assert depth(imported) > depth(module), f"{module} imports {imported}"


def test_inside_the_packages_modules_build_on_the_base_alone():
    allowed = {
        "commands": {
            f"hvd_compress.commands.{name}"
            for name in (
                *("facts", "links", "problems", "training"),
                *("methods", "model_file", "network", "quantities", "predict_report", "tables"),
                "run_file",
            )
        },
        "prediction": {f"hvd_compress.prediction.{name}" for name in ("traffic", "work", "timeline")},
        "compressors": {
            f"hvd_compress.compressors.{name}"
            for name in ("base", "codec", "entries", "footprint", "frames", "gradients", "slot", "qsgd")
        },
        "topologies": {f"hvd_compress.topologies.{name}" for name in ("base", "frames", "nodes", "regions", "scatter")},
        "transports": {f"hvd_compress.transports.{name}" for name in ("base", "rooms", "torch_groups")},
        # choice leads to native and reference, and these to what they share and to the packings
        "kernels": {
            f"hvd_compress.kernels.{name}"
            for name in (
                *(
                    "random",
                    "codec",
                    "moments",
                    "ternary",
                    "quantise",
                    "affine",
                    "sparse",
                    "topk",
                    "gaps",
                    "adacomp",
                    "prune",
                ),
                *("payloads", "counts", "lowrank", "narrow", "positions", "sources"),
                *("native", "reference"),
            )
        },
        "adaptive": {
            f"hvd_compress.adaptive.{name}"
            for name in ("controller", "costs", "journal", "lasting", "layers", "link", "options", "policies", "solver")
        },
        "telemetry": {
            f"hvd_compress.telemetry.{name}" for name in ("counts", "export", "log_file", "records", "spans", "trace")
        },
        "training": {
            f"hvd_compress.training.{name}"
            for name in ("by_parameter", "masks", "momentum", "outer", "pruned", "schedule")
        },
        "activations": {f"hvd_compress.activations.{name}" for name in ("rules", "precision", "kept", "forward")},
    }
    for module in MODULES:
        if part(module) in PACKAGES and MODULES[module].name != "__init__.py":
            inside = {imported for imported, _ in imports(module) if part(imported) == part(module)}
            assert inside <= allowed[part(module)], module


@pytest.mark.parametrize(
    ("library", "modules", "lazily"),
    [
        ("horovod", {"hvd_compress.transports.horovod"}, {"hvd_compress.elastic", *COMMANDS}),
        ("mpi4py", {"hvd_compress.mpi", "hvd_compress.transports.mpi"}, COMMANDS),
    ],
)
def test_only_their_own_modules_import_the_communication_libraries(library, modules, lazily):
    found = [
        (module, when) for module in MODULES for imported, when in imports(module) if imported.split(".")[0] == library
    ]
    assert {module for module, when in found if not when} == modules
    assert {module for module, when in found if when} <= modules | lazily


def test_transports_that_need_a_library_are_imported_where_it_is_there():
    needy = {"hvd_compress.transports.horovod", "hvd_compress.transports.mpi", "hvd_compress.mpi"}
    for module in MODULES.keys() - needy:
        assert not {imported for imported, lazily in imports(module) if imported in needy and not lazily}, module


PROGRAM = """
import sys

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"horovod", "mpi4py"}:
            seen.append(name)
            if sys.argv[1] == "blocked":
                raise ImportError("blocked: " + name)

seen = []
sys.meta_path.insert(0, Watcher())
import torch
import hvd_compress
from hvd_compress import Compression
from hvd_compress.local import LocalRanks
import hvd_compress.elastic

named = [("w", torch.zeros(40, 50))]
for method in (Compression.topk, Compression.terngrad, Compression.adacomp, Compression.bf16):
    ranks = LocalRanks([method(named) for _ in range(2)])
    results = ranks.exchange([{"w": torch.ones(40, 50)} for _ in range(2)])
    assert torch.equal(results[0]["w"], results[1]["w"])
assert not seen, seen
assert not {"horovod", "mpi4py"} & sys.modules.keys()
print("fine")
"""


@pytest.mark.parametrize("libraries", ["blocked", "there"])
def test_simulated_ranks_need_no_communication_library(libraries):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, libraries], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def importable(module: str) -> bool:
    needs = {imported.split(".")[0] for imported, lazily in imports(module) if not lazily}
    needs |= {"mpi4py"} if module == "hvd_compress.mpi" else set()
    return not needs & {"horovod", "mpi4py"}


@pytest.mark.parametrize("module", [name for name in MODULES if importable(name)])
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(module), verbose=False).failed == 0


def test_every_module_is_found_by_its_package():
    found = {name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "hvd_compress.", onerror=lambda _: None)}
    found.discard("hvd_compress.kernels._native")  # a plain shared library
    assert {name for name in MODULES if name != "hvd_compress"} == found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text()))
