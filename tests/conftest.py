"""Shared by all tests: sockets go to a folder that is removed afterwards, and no test touches the user's own home."""

import shutil
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_folder():
    folder = tempfile.mkdtemp(prefix="tt-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setenv("TENURE_HOME", f"{folder}/home")
        patch.setenv("TENURE_SHARES_FILE", f"{folder}/shares.json")
        yield
    shutil.rmtree(folder, ignore_errors=True)
