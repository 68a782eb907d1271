"""A form: what a closure is made into, and the image that holds it in one or more forms.

On disk, under ``$TENURE_HOME/images/<name>/<first 12 digits of the id>/``:

    image.json           the manifest
    closure.lock.json    the files, their hashes, and why each is there
    root.lock.json       the files as they are in its forms, after shrinking, and how it is started: the id is its hash
    seccomp.json         the system calls allowed, in Docker's format
    root/                form root
    image.oci.tar        form oci
    microvm/             form microvm: compressed root, initrd, name of the kernel
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tenure.errors import SpecError

MANIFEST_FILE = "image.json"
LOCK_FILE = "closure.lock.json"
ROOT_LOCK_FILE = "root.lock.json"
SECCOMP_FILE = "seccomp.json"
ID_DIGITS = 12
"""Digits of an image's id in the name of its folder."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Form(StrEnum):
    """What an image can be run as."""

    ROOT = "root"
    """A directory tree, run by the process runtime as the program's root directory."""
    OCI = "oci"
    """An archive that Docker and Podman load, run by the container runtime."""
    MICROVM = "microvm"
    """A compressed root for Debian's cloud kernel, run by the microVM runtime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormRecord:
    """One form of an image, as it was built."""

    path: str
    """Of its file or folder, relative to the image's folder."""
    size_bytes: int
    """On disk, compressed where the form is."""
    sha256: str
    """Of the file; of a folder: `closures.files_hash` of what is in it, paths from its top."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What the form's runtime must know, e.g. ``kernel``, ``initrd``, ``tag``."""
    memory_floor_bytes: int | None = None
    """Smallest memory in which it was seen to answer; None: not measured."""
    cold_start_s: float | None = None
    """Median time from start to the first answer; None: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageManifest:
    """What an image is and how to run it: everything that a runtime needs to know of it."""

    name: str
    """Lower-case letters, digits, ``.``, ``_`` and ``-``; at most 63."""
    id: str
    """SHA-256 in hex of what is in the image after shrinking and of how it is started: `Closure.hash` of its root lock file."""
    closure_hash: str
    """`Closure.hash` of the lock file beside it."""
    entry: tuple[str, ...]
    """The command."""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    ports: tuple[int, ...] = ()
    """TCP ports on which the program listens, inside."""
    door: str = ""
    """``v2``: the Open Inference Protocol over HTTP on the first port; empty: the program's own business."""
    engine: str = ""
    """Inference engine and version, e.g. ``onnxruntime 1.31.0``; empty: none known."""
    forms: Mapping[Form, FormRecord] = field(default_factory=dict)
    system_calls: tuple[str, ...] = ()
    """Names allowed by `seccomp`, sorted."""
    seccomp: str = ""
    """File name of the profile in the image's folder; empty: there is none, nothing is filtered."""
    keep: tuple[str, ...] = ()
    """What its builder was told not to leave out: `images.build.STEPS`, or ``all``; a repair keeps it, too."""

    def __post_init__(self) -> None:
        check_image_name(self.name)
        if not re.fullmatch(r"[0-9a-f]{64}", self.id):
            raise SpecError(f"image {self.name}: the id must be a SHA-256 in hex; found {self.id!r}")
        if not self.entry:
            raise SpecError(f"image {self.name}: the command is empty")
        if self.door not in ("", "v2"):
            raise SpecError(f'image {self.name}: the door is "v2" or ""; found {self.door!r}')
        if self.door and not self.ports:
            raise SpecError(f"image {self.name}: a door needs a port; found none")

    @property
    def short_id(self) -> str:
        """The first digits of the id, as in the folder's name."""
        return self.id[:ID_DIGITS]


def check_image_name(name: str) -> str:
    """Return the name. Raises SpecError when no image can have it."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"an image's name has lower-case letters, digits, '.', '_' and '-', at most 63, the first a letter or digit; "
            f"found {name!r}"
        )
    return name
