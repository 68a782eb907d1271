"""Rules about the shape of the code, read from the source itself: who may import what, how long a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "tenure"
NOUNS = frozenset(
    {
        "closures",
        "codec",
        "cpio",
        "errors",
        "devices",
        "forms",
        "resources",
        "retention",
        "jobs",
        "runs",
        "sweeps",
        "leases",
        "links",
        "nodes",
        "orders",
        "tenants",
        "usage",
        "trials",
        "prices",
        "events",
        "frames",
        "protocols",
        "wire",
    }
)
ROOMS = frozenset(
    (
        "decide",
        "meter",
        "runtimes",
        "agent",
        "fleet",
        "ledger",
        "broker",
        "train",
        "serve",
        "images",
        "recommend",
        "experiments",
        "cli",
    )
)
EDGES = frozenset({"verbs", "leasing", "keeping", "app"})
OTHERS = frozenset({"sockets", "homes", "jobfile", "data"})
"""`sockets` sits beside meter; `homes` says whose a home is; `jobfile` and `data` turn files' text into nouns."""

IMPURE = frozenset(
    {
        "asyncio",
        "concurrent",
        "ctypes",
        "fcntl",
        "glob",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "platform",
        "psutil",
        "random",
        "requests",
        "secrets",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "sqlalchemy",
        "sqlite3",
        "ssl",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
        "urllib",
        "uuid",
    }
)
MAX_LINES = 450
"""The aim is 400; from there on a module should be looked at for a second noun."""


def modules(folder):
    return sorted(path for path in folder.rglob("*.py") if "serve/v2/" not in str(path))


def imports(path):
    """Yield the full name of everything a module imports, ``from x import y`` as ``x.y``; type-checking imports left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    package = ["tenure", *path.relative_to(SRC).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in skipped:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(name):
    """Return the noun, room or edge that an import names, or None."""
    parts = name.split(".")
    return parts[1] if parts[0] == "tenure" and len(parts) > 1 else None


def test_every_module_has_its_place_in_the_drawing():
    found = {path.stem for path in SRC.glob("*.py")} | {path.parent.name for path in SRC.glob("*/__init__.py")}
    assert found - {"__init__"} <= NOUNS | ROOMS | EDGES | OTHERS


def test_nouns_import_nothing_of_ours_but_nouns():
    wrong = {
        f"{noun} imports {name}"
        for noun in NOUNS
        for name in imports(SRC / f"{noun}.py")
        if ours(name) and ours(name) not in NOUNS
    }
    assert not wrong


def test_deciders_are_pure():
    wrong = {
        f"{path.relative_to(SRC)} imports {name}"
        for path in modules(SRC / "decide")
        for name in imports(path)
        if name.split(".")[0] in IMPURE
        or (ours(name) and ours(name) not in NOUNS | {"decide"})
        or name.startswith("numpy.random")
    }
    assert not wrong


def test_deciders_read_no_clock_and_draw_no_numbers():
    banned = {"open", "input", "print"}
    wrong = [
        f"{path.relative_to(SRC)}:{node.lineno} calls {node.func.id}"
        for path in modules(SRC / "decide")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["train", "serve", "images"])
def test_training_serving_and_images_import_nouns_decide_and_meter_only(room):
    allowed = NOUNS | {"decide", "meter", room, "__version__"}
    wrong = {
        f"{path.relative_to(SRC)} imports {name}"
        for path in modules(SRC / room)
        for name in imports(path)
        if ours(name) and ours(name) not in allowed
    }
    assert not wrong


SIBLINGS = [
    ("runtimes/process", "runtimes/container", "runtimes/microvm"),
    ("serve/http", "serve/grpc"),
    ("fleet/local", "fleet/ray"),
    *(
        tuple(str(path.relative_to(SRC).with_suffix("")) for path in modules(SRC / folder) if path.stem != "__init__")
        for folder in ("serve/engines", "serve/transports")
    ),
]


@pytest.mark.parametrize("siblings", SIBLINGS, ids=lambda siblings: siblings[0])
def test_siblings_never_import_each_other(siblings):
    names = {sibling: "tenure." + sibling.replace("/", ".") for sibling in siblings}
    for sibling in siblings:
        home = SRC / sibling
        paths = modules(home) if home.is_dir() else [home.with_suffix(".py")]
        others = [names[other] for other in siblings if other != sibling]
        for path in (p for p in paths if p.exists()):
            wrong = [name for name in imports(path) if any(name == o or name.startswith(o + ".") for o in others)]
            assert not wrong, f"{path.relative_to(SRC)} imports its sibling: {wrong}"


def test_only_the_broker_opens_the_ledger():
    wrong = {
        f"{path.relative_to(SRC)} imports {name}"
        for path in modules(SRC)
        for name in imports(path)
        if path.relative_to(SRC).parts[0] not in ("ledger", "broker")
        and (ours(name) == "ledger" or name.split(".")[0] in ("sqlalchemy", "sqlite3", "alembic"))
    }
    assert not wrong


def loaded_by(module):
    """Return the names of all modules that importing one loads, in a fresh interpreter."""
    code = f"import sys; before = set(sys.modules); import {module}; print('\\n'.join(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_but_itself():
    assert {name for name in loaded_by("tenure") if name.startswith("tenure")} == {"tenure"}
    assert "numpy" not in loaded_by("tenure")


def test_a_training_worker_loads_the_standard_library_and_numpy_only():
    third_party = {name.split(".")[0] for name in loaded_by("tenure.train.worker")} - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith("_")} <= {"tenure", "numpy"}


def test_a_training_worker_loads_no_room_but_its_own():
    rooms = {ours(name) for name in loaded_by("tenure.train.worker") if ours(name)}
    assert rooms <= NOUNS | {"train"}


def test_no_module_has_grown_past_its_bound():
    long = {str(path.relative_to(SRC)): n for path in modules(SRC) if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"past {MAX_LINES} lines, look for a second noun: {long}"


def test_every_module_says_what_it_is_for():
    silent = [str(path.relative_to(SRC)) for path in modules(SRC) if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent
