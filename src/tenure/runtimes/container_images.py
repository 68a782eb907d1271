"""Images of Tenure in an engine: the archive of a form `oci` is loaded where it is missing, and named by its own hash.

Not for: making one (`images.oci`), the image that stands for this machine's Python (`runtimes.images`).
"""

from __future__ import annotations

import os

from tenure.errors import SpecError, Unavailable
from tenure.runtimes.container_engine import Engine, EngineError
from tenure.runtimes.rooted import form_path, read_image

LOAD_MAX_S = 600.0
"""Bound of loading one archive: an engine unpacks about 100 MB in a second, and disks differ."""


def ensure_loaded(engine: Engine, folder: str) -> str:
    """Return the id under which the engine has the image in a folder, after loading it where it is missing.

    Raises SpecError when there is no such form or its archive is damaged, Unavailable when the engine cannot take it.
    """
    archive = form_path(folder, "oci")
    found = read_image(folder)
    name = str(found["forms"]["oci"].get("details", {}).get("image_id", ""))
    if not name:
        raise SpecError(f"image {found.get('name', folder)}: its oci form does not say its id; build the image anew")
    if _has(engine, name):
        return name
    try:
        with open(archive, "rb") as stream:
            engine.call("POST", "/images/load", archive=stream, timeout_s=LOAD_MAX_S, quiet=True)
    except EngineError as error:
        raise SpecError(f"the engine does not take {archive}: {error}. Build the image anew") from error
    if not _has(engine, name):
        raise SpecError(
            f"the engine did not find image {name} in {archive}, {os.path.getsize(archive)} bytes: the archive is damaged, "
            "or the disk of the engine is full. Build the image anew, or free space"
        )
    return name


def _has(engine: Engine, name: str) -> bool:
    try:
        engine.call("GET", f"/images/{name}/json")
    except EngineError as error:
        if error.status == 404:
            return False
        raise Unavailable(f"the engine does not say whether it has the image {name}: {error}") from error
    return True
