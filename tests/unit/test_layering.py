"""Imports flow one way: the table of DESIGN.md section 5, enforced on the syntax tree.

A module may import from layers below its own, from its own package, and inside its layer from what is listed before it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (layer, names below `moecomm.`), lowest first; order inside a layer counts too.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("0", ("_version", "errors", "_env")),
    (
        "1",
        (
            "presets",
            "blobs",
            "board",
            "rendezvous",
            "metrics",
            "group",
            "launch",
            "topology",
            "placement",
            "quant",
            "_compiled",
            "_jit",
            "shared_code",
            "_rows_jit",
            "_quant_jit",
            "_tags_jit",
            "blocks",
            "rows",
        ),
    ),
    ("2", ("_plan_jit", "plan", "handle", "reference")),
    ("K", ("kernels",)),
    ("3", ("memory", "transport")),
    (
        "4",
        (
            *("_operator", "checks", "footprint", "watchdog", "core", "operations", "integrity", "fused", "encoding"),
            *("padded", "autograd", "_express_jit", "express", "traced", "membership", "calls", "buffer"),
        ),
    ),
    ("5", ("overlap", "nn", "diagnostics", "viz", "testing", "deep_ep", "integrations")),
    ("6", ("cli", "__main__")),
)
PLACE = {name: (depth, i) for depth, (_, names) in enumerate(LAYERS) for i, name in enumerate(names)}
USER_LAYER = [layer for layer, _ in LAYERS].index("5")

TRANSPORTS = {f"moecomm.transport.{name}" for name in ("local", "symmetric", "collective", "mpi", "hierarchical")}
# Beyond the table: (importer, imported, why).
FORBIDDEN = (
    ("moecomm.reference", "moecomm.plan", "the oracle must not share code with what it checks"),
    ("moecomm.transport", "moecomm.plan", "transports know nothing of experts or weights"),
    ("moecomm.transport", "moecomm.placement", "transports know nothing of experts or weights"),
    ("moecomm.kernels", "moecomm", "kernels import nothing of moecomm"),
)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports(module: str, tree: ast.AST, modules: set[str], is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield every module of moecomm that `module` imports, wherever in the file, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            # `from package import name` imports a module where there is one of that name.
            found = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
            found += [
                f"{base}.{a.name}" for a in node.names if a.name.startswith("_") and f"{base}.{a.name}" not in found
            ]
        else:
            continue
        yield from ((name, node.lineno) for name in dict.fromkeys(found) if is_inside(name, "moecomm"))


def judge(module: str, target: str) -> str | None:
    """Return why `module` must not import `target`, or None."""
    for importer, imported, why in FORBIDDEN:
        if is_inside(module, importer) and is_inside(target, imported) and not is_inside(target, importer):
            return why
    if module in TRANSPORTS and target in TRANSPORTS - {module}:
        return "transports never import each other"
    own, other = (name.split(".")[1] if "." in name else "" for name in (module, target))
    if own == "" or own == other:  # the root package sees everything; a package sees itself
        return None
    if own not in PLACE:
        return "the module has no place in the layers"
    if PLACE[own][0] >= USER_LAYER and other != "_version" and any(part.startswith("_") for part in target.split(".")):
        return "this layer uses only what a user could use"
    if other == "":
        return None if PLACE[own][0] >= USER_LAYER else "the root package imports this layer"
    if other in PLACE and PLACE[other] >= PLACE[own]:
        return "it is no lower layer"
    return None


def reads_environment(tree: ast.AST) -> Iterator[int]:
    """Yield the lines that read a variable. Setting one for a child, or handing it all of them, is not reading."""
    for node in ast.walk(tree):
        read = ""
        if isinstance(node, ast.Attribute):
            read = ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            read = ast.unparse(node.value) + "[]"
        elif isinstance(node, ast.Compare):
            read = "in " + " ".join(map(ast.unparse, node.comparators))
        if read != "os.environ.copy" and re.match(r"os\.environ[.\[]|os\.getenv|os\.environb|in .*os\.environ$", read):
            yield node.lineno  # type: ignore[attr-defined]  # all three have one
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv"))


def violations(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Check modules given as name -> source text; `packages` are those that are an `__init__.py`."""
    found = []
    for module, source in sources.items():
        tree = ast.parse(source)
        for target, line in imports(module, tree, set(sources), module in packages):
            why = judge(module, target)
            if why is not None:
                found.append(f"{module}:{line} imports {target}: {why}")
        if module != "moecomm._env":
            found += [f"{module}:{line} reads the environment: only _env.py does" for line in reads_environment(tree)]
    return found


def package_sources() -> tuple[dict[str, str], frozenset[str]]:
    sources, packages = {}, set()
    for folder, package in (("moecomm", "moecomm"), ("kernels", "moecomm.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            sources[name] = path.read_text(encoding="utf-8")
            if parts[-1] == "__init__":
                packages.add(name)
    return sources, frozenset(packages)


def test_imports_flow_one_way() -> None:
    sources, packages = package_sources()
    assert {"moecomm", "moecomm.errors", "moecomm.group"} <= set(sources), "the walk found no package"
    found = violations(sources, packages)
    assert not found, "\n".join(found)


def test_every_module_has_a_layer() -> None:
    sources, _ = package_sources()
    strangers = {name.split(".")[1] for name in sources if "." in name} - set(PLACE)
    assert not strangers, f"give {strangers} a row in DESIGN.md section 5 and in LAYERS"


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("moecomm.errors", "from moecomm.group import Group", "no lower layer"),
        ("moecomm.group", "from moecomm import topology", "no lower layer"),
        ("moecomm.group", "from . import topology", "no lower layer"),
        ("moecomm.group", "def late():\n    import moecomm.buffer", "no lower layer"),
        ("moecomm.plan", "from moecomm.transport.base import Transport", "no lower layer"),
        ("moecomm.memory.host", "import moecomm.transport.local", "no lower layer"),
        ("moecomm.buffer", "from moecomm import Buffer", "the root package imports this layer"),
        ("moecomm.reference", "from moecomm.plan import plan", "must not share code"),
        ("moecomm.transport.mpi", "from moecomm.transport.local import Local", "never import each other"),
        ("moecomm.transport.mpi", "from .local import Local", "never import each other"),
        ("moecomm.transport.base", "from moecomm.placement import ExpertPlacement", "know nothing of experts"),
        ("moecomm.kernels.push", "from moecomm.errors import ConfigError", "kernels import nothing"),
        ("moecomm.nn", "from moecomm import _env", "only what a user could use"),
        ("moecomm.testing.cases", "from moecomm.group import _Wait", "only what a user could use"),
        ("moecomm.novelty", "import moecomm.errors", "no place"),
        ("moecomm.group", "import os\nx = os.environ['X']", "only _env.py"),
        ("moecomm.group", "import os\nx = os.environ.get('X')", "only _env.py"),
        ("moecomm.group", "import os\nx = 'X' in os.environ", "only _env.py"),
        ("moecomm.group", "import os\nx = os.getenv('X')", "only _env.py"),
        ("moecomm.kernels.push", "from os import environ", "only _env.py"),
    ],
)
def test_the_check_can_fail(module: str, source: str, reason: str) -> None:
    modules = {"moecomm.topology": "", "moecomm._env": "", "moecomm.transport.local": "", module: source}
    found = violations(modules)
    assert len(found) == 1, found
    assert reason in found[0]


def test_what_is_allowed_passes() -> None:
    modules = {
        "moecomm": "from moecomm.buffer import Buffer",
        "moecomm._env": "import os\nx = os.environ['X']",
        "moecomm.transport": "from moecomm.transport.local import Local\nfrom moecomm.transport.mpi import Mpi",
        "moecomm.transport.local": "from moecomm.transport.base import Transport\nfrom .base import Transport",
        "moecomm.transport.base": "from moecomm.errors import StallError\nfrom moecomm.group import Group",
        "moecomm.kernels.push": "from moecomm.kernels import sync\nfrom moecomm.kernels.sync import signal",
        "moecomm.nn": "import moecomm\nfrom moecomm import Buffer",
        "moecomm.testing.launch": "import os\na = dict(os.environ)\nb = os.environ.copy()\nos.environ['X'] = '1'",
    }
    assert violations(modules, frozenset({"moecomm", "moecomm.transport"})) == []
