"""Who may import whom: read from the source of every module, and seen in a fresh interpreter for what comes along.

- core: the standard library and pydantic (settings reads YAML too, but only when asked to read a file).
- vllm: only in preft.engine, preft.transfer.connector and bench. ray: only in preft.cluster.
- worker.prefill and worker.decode never import each other, and neither do gateway.http and gateway.grpc.
- gateway.text and gateway.bodies know neither door. adapters.formats and adapters.sources know neither store nor
  catalog, and formats knows no sources. memory knows no KV transfer, and worker knows neither gateway nor cluster.
- Load generator, client and server import nothing of each other, but the server's command line knows the load
  generator. Nothing imports bench.
- Everything but engine, transfer, cluster, training and convert stays free of torch, vllm, ray and transformers, in
  itself and through what it imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (ROOT / "services", ROOT / "loadgen", ROOT / "kernels", ROOT / "client")
BENCH = ROOT / "bench"
HEAVY = frozenset({"torch", "vllm", "ray", "transformers"})
HEAVY_PACKAGES = frozenset({"engine", "transfer", "convert", "training", "cluster"})
LIGHT_AT_LEAST = frozenset({"core", "rpc", "state", "adapters", "router", "gateway", "cli", "memory", "worker"})
CORE_ALLOWED = frozenset(sys.stdlib_module_names) | {"pydantic"}
CORE_EXCEPTIONS = {"preft.core.settings": {"yaml"}, "preft.core.yaml_text": {"yaml"}}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for root in SOURCE_ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted(BENCH.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
LIGHT_PACKAGES = sorted(
    {
        ".".join(name.split(".")[:2]) if name.startswith("preft.") else name.split(".")[0]
        for name in MODULES
        if name.split(".")[0] in ("preft", "preft_loadgen", "preft_client")
        and name != "preft"
        and not (name.startswith("preft.") and name.split(".")[1] in HEAVY_PACKAGES)
    }
)


def imports(source: str, module: str = "", *, is_package: bool = False) -> Iterator[str]:
    """Dotted names that `source` imports anywhere, also in functions; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_by(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(path.read_text(), module, is_package=path.name == "__init__.py"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_reader_sees_every_kind_of_import() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef lazy():\n    import h"
    assert set(imports(source, "preft.x.y")) == {"a.b", "c.d", "preft.x.e", "preft.f.g", "h"}
    assert set(imports("from . import e", "preft.x", is_package=True)) == {"preft.x.e"}


def test_nothing_escapes_the_rule() -> None:
    assert {f"preft.{name}" for name in LIGHT_AT_LEAST} <= set(LIGHT_PACKAGES)
    assert "preft_loadgen" in LIGHT_PACKAGES


@pytest.mark.parametrize("module", sorted(name for name in MODULES if within(name, "preft.core")))
def test_core_needs_only_the_standard_library_and_pydantic(module: str) -> None:
    foreign = {name.split(".")[0] for name in imported_by(module) if not within(name, "preft.core")}
    assert foreign <= CORE_ALLOWED | CORE_EXCEPTIONS.get(module, set())


@pytest.mark.parametrize(
    ("package", "homes"),
    [("vllm", ("preft.engine", "preft.transfer.connector", "bench")), ("ray", ("preft.cluster",))],
)
def test_engine_and_control_plane_have_one_home(package: str, homes: tuple[str, ...]) -> None:
    users = {module for module in MODULES if any(within(name, package) for name in imported_by(module))}
    assert {module for module in users if not any(within(module, home) for home in homes)} == set()


STRANGERS = [
    ("preft.worker.prefill", "preft.worker.decode"),
    ("preft.worker.decode", "preft.worker.prefill"),
    ("preft.gateway.http", "preft.gateway.grpc"),
    ("preft.gateway.grpc", "preft.gateway.http"),
    ("preft.gateway.text", "preft.gateway.http"),
    ("preft.gateway.text", "preft.gateway.grpc"),
    ("preft.gateway.bodies", "preft.gateway.http"),
    ("preft.gateway.bodies", "preft.gateway.grpc"),
    ("preft.gateway.bodies", "preft.gateway.text"),
    ("preft.adapters.sources", "preft.adapters.store"),
    ("preft.adapters.sources", "preft.adapters.catalog"),
    ("preft.adapters.formats", "preft.adapters.sources"),
    ("preft.adapters.formats", "preft.adapters.store"),
    ("preft.adapters.formats", "preft.adapters.catalog"),
    ("preft.memory", "preft.transfer"),
    ("preft.worker", "preft.gateway"),
    ("preft.worker", "preft.cluster"),
    ("preft_loadgen", "preft"),
    ("preft_loadgen", "preft_client"),
    ("preft_client", "preft"),
    ("preft_client", "preft_loadgen"),
    ("preft", "preft_client"),
    ("preft", "bench"),
    ("preft_loadgen", "bench"),
    ("preft_kernels", "preft"),
]


@pytest.mark.parametrize(("package", "other"), STRANGERS)
def test_packages_that_never_import_another(package: str, other: str) -> None:
    own = [module for module in MODULES if within(module, package)]
    assert own
    assert [module for module in own if any(within(name, other) for name in imported_by(module))] == []


@pytest.mark.parametrize("package", LIGHT_PACKAGES)
def test_light_packages_name_nothing_heavy(package: str) -> None:
    own = [module for module in MODULES if within(module, package)]
    heavy = {module: {name for name in imported_by(module) if name.split(".")[0] in HEAVY} for module in own}
    assert {module: names for module, names in heavy.items() if names} == {}


@pytest.mark.parametrize("package", LIGHT_PACKAGES)
def test_light_packages_load_nothing_heavy(package: str) -> None:
    own = [module for module in MODULES if within(module, package) and not module.endswith("__main__")]
    path = [str(root) for root in SOURCE_ROOTS]
    code = (
        f"import sys, importlib; sys.path[:0] = {path}\n"
        f"for name in {own}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {set(HEAVY)} & set(sys.modules)\n"
        "    assert not heavy, f'{name} brings in {heavy}'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
