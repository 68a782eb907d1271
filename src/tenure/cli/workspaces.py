"""What `tenure lease --env --image --runtime` mean, and what is said while an environment is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenure.cli import output
from tenure.errors import SpecError

if TYPE_CHECKING:  # the nouns cost 60 ms, which `tenure --help` need not pay
    from tenure.broker.workspace_setup import Setup
    from tenure.leases import Lease


def setup(requirements: Path | None, image: str, runtime: str) -> Setup:
    """Return what the holder asked for. Raises SpecError."""
    from tenure.broker.workspace_setup import Setup

    found: dict[str, Any] = {"requirements": requirements.absolute() if requirements else None, "image": image}
    if runtime not in ("", "process", "container"):
        raise SpecError(f"a workspace runs in process or container; found {runtime!r}")
    return Setup(**found, runtime=runtime or None)  # type: ignore[arg-type]


def told(text: str) -> None:
    """Say on stderr how an environment comes along."""
    output.say(f"environment: {output.clean(text)}", sys.stderr)


def as_json(held: Lease, url: str) -> str:
    """Return the lease as JSON; with `url` beside its fields when JupyterLab is what it runs."""
    if not url:
        return output.as_json(held)
    import msgspec

    return output.as_json({**msgspec.to_builtins(held), "url": url})
