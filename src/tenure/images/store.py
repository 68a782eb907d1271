"""Where images lie, and how one is found by what people type.

    $TENURE_HOME/images/<name>/<first 12 digits of the id>/   as `forms` says
    $TENURE_HOME/images/.building-…/                          one that is being built; removed when its builder is gone

Not for: what is in an image (`build`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from tenure.errors import CorruptData, NotFound, SpecError
from tenure.forms import MANIFEST_FILE, Form, FormRecord, ImageManifest

_BUILDING = re.compile(r"\.building-(\d+)-[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """One image, and where it lies."""

    folder: Path
    manifest: ImageManifest
    built_at_s: float
    """UTC seconds, of its manifest's last change."""

    def form_path(self, form: Form) -> Path:
        """Return where a form's file or folder lies. Raises NotFound when it was not built."""
        if form not in self.manifest.forms:
            had = ", ".join(self.manifest.forms) or "none"
            raise NotFound(
                f'image {self.manifest.name} has no form "{form}", only: {had}. Build it: tenure image build … --form {form}'
            )
        return self.folder / self.manifest.forms[form].path

    @property
    def size_bytes(self) -> int:
        """Return the size of all its forms together."""
        return sum(record.size_bytes for record in self.manifest.forms.values())


class ImageStore:
    """The images of one home."""

    def __init__(self, home: Path) -> None:
        """home: $TENURE_HOME; its folder ``images`` is made when first needed."""
        self.folder = home / "images"

    def images(self, name: str = "") -> tuple[StoredImage, ...]:
        """Return the images that can be read, newest first; name: only those of this name."""
        found = []
        for manifest in self.folder.glob(f"{name or '[!.]*'}/*/{MANIFEST_FILE}"):
            with contextlib.suppress(NotFound, CorruptData):
                found.append(read_image(manifest.parent))
        return tuple(sorted(found, key=lambda image: (-image.built_at_s, image.manifest.name, image.manifest.id)))

    def find(self, text: str) -> StoredImage:
        """Return the image that a text means: a folder, a name (its newest), ``NAME:ID``, or an id (4 digits do).

        Raises NotFound, SpecError when several fit, CorruptData.
        """
        if os.sep in text or text in (".", ".."):
            return read_image(Path(text).absolute())
        name, _, digits = text.partition(":")
        if not digits and (of_name := self.images(name) if not set(name) & set("*?[") else ()):
            return of_name[0]
        if digits or re.fullmatch(r"[0-9a-f]{4,64}", text):
            wanted = digits or text
            fit = [image for image in self.images(name if digits else "") if image.manifest.id.startswith(wanted)]
            if len(fit) > 1:
                ids = ", ".join(f"{image.manifest.name}:{image.manifest.short_id}" for image in fit)
                raise SpecError(f"{text} fits several images: {ids}. Give more digits")
            if fit:
                return fit[0]
        known = ", ".join(dict.fromkeys(image.manifest.name for image in self.images())) or "none"
        raise NotFound(f'there is no image {text!r} in {self.folder}; there are: {known}. "tenure image build" makes one')

    @contextmanager
    def building(self) -> Iterator[Path]:
        """Give an empty folder on the store's own disk, which is gone afterwards, and so are those of builders that died."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():
            if (match := _BUILDING.fullmatch(left.name)) and not os.path.exists(f"/proc/{match[1]}"):
                shutil.rmtree(left, ignore_errors=True)
        folder = self.folder / f".building-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, folder: Path, manifest: ImageManifest) -> StoredImage:
        """Take over what was built in a folder of `building`. The same image with other forms is there: both's forms stay."""
        place = self.folder / manifest.name / manifest.short_id
        if place.is_dir():
            with contextlib.suppress(NotFound, CorruptData):
                old = read_image(place).manifest
                kept = {form: record for form, record in old.forms.items() if form not in manifest.forms}
                for record in kept.values():
                    if (place / record.path).exists():
                        os.replace(place / record.path, folder / record.path)
                manifest = replace(manifest, forms={**kept, **manifest.forms})
            shutil.rmtree(place)
        write_manifest(folder, manifest)
        place.parent.mkdir(exist_ok=True)
        for each in (folder, place.parent, self.folder):  # a program that is not root reads its image too
            os.chmod(each, 0o755)
        os.rename(folder, place)
        return read_image(place)

    def remove(self, image: StoredImage) -> None:
        """Remove an image with all its forms. What runs of it goes on with the files that it has open."""
        away = self.folder / f".building-{os.getpid()}-{secrets.token_hex(4)}"
        os.rename(image.folder, away)  # no half of an image is ever found
        shutil.rmtree(away)
        with contextlib.suppress(OSError):
            image.folder.parent.rmdir()


def read_image(folder: Path) -> StoredImage:
    """Return the image in a folder. Raises NotFound, CorruptData."""
    path = folder / MANIFEST_FILE
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=ImageManifest)
        return StoredImage(folder=folder, manifest=manifest, built_at_s=path.stat().st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f'there is no image in {folder}: it has no {MANIFEST_FILE}. "tenure image list" shows those there are'
        ) from None
    except (msgspec.MsgspecError, SpecError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path} is not the manifest of an image: {error}. Build the image anew") from error


def write_manifest(folder: Path, manifest: ImageManifest) -> None:
    """Write an image's manifest, whole or not at all, as text that people can read."""
    part = folder / f".{MANIFEST_FILE}.part"
    part.write_text(json.dumps(msgspec.to_builtins(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    os.replace(part, folder / MANIFEST_FILE)


def with_measures(
    image: StoredImage, form: Form, *, memory_floor_bytes: int | None = None, cold_start_s: float | None = None
) -> StoredImage:
    """Note what was measured of a form in its manifest; None leaves a figure as it is. Raises NotFound."""
    image.form_path(form)
    old = image.manifest.forms[form]
    record: FormRecord = replace(
        old,
        memory_floor_bytes=old.memory_floor_bytes if memory_floor_bytes is None else memory_floor_bytes,
        cold_start_s=old.cold_start_s if cold_start_s is None else cold_start_s,
    )
    manifest = replace(image.manifest, forms={**image.manifest.forms, form: record})
    write_manifest(image.folder, manifest)
    return read_image(image.folder)
