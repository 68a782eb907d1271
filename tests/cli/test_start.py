"""What the command loads before it knows its verb: little, so that --help is quick."""

import subprocess
import sys

HEAVY = ("numpy", "scipy", "rich", "sqlalchemy", "matplotlib", "onnxruntime", "asyncio", "msgspec", "psutil", "tenure.verbs")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, contextlib, io\n"
        "from tenure.cli.main import run\n"
        "with contextlib.redirect_stdout(io.StringIO()): assert run(['--help']) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tenure.cli", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("tenure ")
