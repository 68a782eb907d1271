"""Triton's Model Analyzer, for its searches alone: no server is started. They are driven by `programs/analyzer_search`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import homes

NAME = "model_analyzer"
ABOUT = "Model Analyzer's quick and Optuna searches"
_PACKAGES = ("triton-model-analyzer==1.58.0",)


def install(root: Path) -> Path:
    """See Peer."""
    return homes.make(root, NAME, packages=_PACKAGES)


def command(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """See ToolPeer."""
    return (str(homes.python(home)),), {}
