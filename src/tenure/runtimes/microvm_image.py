"""The microVM form of an image as it lies on disk: read, and checked to be what was built. Not for: building it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenure.errors import CorruptData, NotFound, SpecError
from tenure.forms import LOCK_FILE, MANIFEST_FILE, Form

_PARTS = ("kernel", "initrd", "root")
_checked: dict[tuple[str, int, int, int], str] = {}
"""Path, size, time of change and inode -> the hash found: a file that stays as it is need not be read at every start."""
_checked_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrovmImage:
    """What a start needs to know of an image."""

    name: str
    folder: Path
    kernel: Path
    initrd: Path
    root: Path
    root_type: str
    """File system of the root; empty: there is none, all of it is in `initrd`."""
    modules: tuple[str, ...]
    kernel_format: str
    """``elf`` or ``bzimage``."""
    env: tuple[tuple[str, str], ...]
    workdir: str

    def has_program(self, name: str, search: str) -> bool | None:
        """Return whether the closure lists a program, a bare name looked for along `search`; None when there is no list.

        A path through a link of the closure is believed: only the guest can follow it.
        """
        try:
            text = (self.folder / LOCK_FILE).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
        if "/" in name and not name.startswith("/"):
            return None
        paths = [name] if "/" in name else [f"{folder}/{name}" for folder in search.split(":") if folder]
        links = (folder for path in paths for folder in _parents(path) if '"symlink"' in _entry(folder, text))
        return any(_entry(path, text) for path in paths) or next(links, None) is not None


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:number]) for number in range(2, len(parts))]


def _entry(path: str, lock: str) -> str:
    """Return the line of a closure's lock file that lists a path; empty when none does."""
    at = lock.find(f'"path":{json.dumps(path, ensure_ascii=False)}')
    return lock[lock.rfind("\n", 0, at) + 1 : lock.find("\n", at)] if at >= 0 else ""


def find_image(image: str, images_dir: Path | None) -> Path:
    """Return the folder of an image given as that folder's path, as NAME (the latest built), or as NAME/ID. Raises NotFound."""
    if os.path.isabs(image):
        folder = Path(image)
        if not (folder / MANIFEST_FILE).is_file():
            raise NotFound(f"no image at {folder}: it has no {MANIFEST_FILE}")
        return folder
    if images_dir is None:
        raise NotFound(f"no image {image!r}: this node has no folder of images; give the path of an image's folder")
    found = [folder for folder in (images_dir / image, *(images_dir / image).glob("*")) if (folder / MANIFEST_FILE).is_file()]
    if not found or ".." in Path(image).parts:
        known = sorted(path.name for path in images_dir.glob("*")) if images_dir.is_dir() else []
        raise NotFound(f"no image {image!r} in {images_dir}; there {'are ' + ', '.join(known[:20]) if known else 'is none'}")
    return max(found, key=lambda folder: (folder / MANIFEST_FILE).stat().st_mtime_ns)


def read_image(folder: Path) -> MicrovmImage:
    """Return the microVM form of the image in a folder, its files checked against their hashes.

    Raises SpecError when it has no such form, CorruptData when a file is not what was built.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        record = manifest["forms"].get(Form.MICROVM.value)
        if record is None:
            forms = ", ".join(manifest["forms"]) or "none"
            raise SpecError(f"image {folder} has no form microvm (it has {forms}); build it with --form microvm")
        return _image(folder, manifest, record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"{path} is not the manifest of an image: {type(error).__name__} {error}; build the image again"
        ) from error


def _image(folder: Path, manifest: dict[str, Any], record: dict[str, Any]) -> MicrovmImage:
    details = record["details"]
    paths = {}
    for part in _PARTS:
        paths[part] = folder / record["path"] / details[part]
        _check(paths[part], str(details[f"{details[part]}_sha256"]), str(manifest["name"]))
    return MicrovmImage(
        name=str(manifest["name"]),
        folder=folder,
        kernel=paths["kernel"],
        initrd=paths["initrd"],
        root=paths["root"],
        root_type=str(details["root_type"]),
        modules=tuple(str(details["modules"]).split()),
        kernel_format=str(details.get("kernel_format", "bzimage")),
        env=tuple(sorted((str(key), str(value)) for key, value in dict(manifest.get("env") or {}).items())),
        workdir=str(manifest.get("workdir") or "/"),
    )


def _check(path: Path, sha256: str, name: str) -> None:
    try:
        with path.open("rb") as stream:
            state = os.fstat(stream.fileno())
            key = (str(path), state.st_size, state.st_mtime_ns, state.st_ino)
            with _checked_lock:
                found = _checked.get(key, "")
            if not found:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
                with _checked_lock:
                    _checked[key] = found
    except OSError as error:
        raise CorruptData(f"image {name}: {path} cannot be read: {error}; build the image again") from error
    if found != sha256:
        raise CorruptData(
            f"image {name}: {path} is not what was built (SHA-256 {found[:12]}…, not {sha256[:12]}…); build it again"
        )
