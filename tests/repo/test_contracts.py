"""The import contracts of .importlinter hold; docs/architecture.md lists each of them beside the drawing."""

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def contract_names():
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    return [config[section]["name"] for section in config.sections() if section.startswith("importlinter:contract:")]


def test_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_architecture_page_lists_every_contract():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert contract_names()
    missing = [name for name in contract_names() if name not in page]
    assert not missing
