"""The model files of one server: found in a folder or given as one file, by name and version. Nothing is loaded here.

Layouts: FILE; DIR/NAME.onnx; DIR/NAME/model.onnx; DIR/NAME/VERSION/model.onnx (VERSION a whole number; the highest is
served when none is asked for), which is Triton's. The folder is looked at again for each load and index.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tenure.errors import NotFound, SpecError
from tenure.serve.engines import ENGINES
from tenure.serve.options import read_options
from tenure.serve.plane import ModelOptions


class ModelFiles:
    """Where models are."""

    def __init__(self, path: Path, *, name: str = "", endings: Iterable[str] = tuple(ENGINES)) -> None:
        """path: a model file or a folder. name: of a single file; else its stem. endings: of files that are models.

        Raises NotFound for a missing path, SpecError when nothing is found there.
        """
        self._path = path
        self._name = name
        self._endings = tuple(endings)
        if not self.scan():
            raise SpecError(
                f"no model in {path}: expected NAME.onnx, NAME/model.onnx or NAME/VERSION/model.onnx "
                f"(endings known: {', '.join(self._endings)})"
            )

    def scan(self) -> dict[str, dict[str, Path]]:
        """Return what is there now: name → version → file, versions in order. Raises NotFound for a missing path."""
        path = self._path
        if path.is_file():
            return {self._name or path.stem: {"1": path}}
        if not path.is_dir():
            raise NotFound(f"there is no model file or folder {path}")
        found: dict[str, dict[str, Path]] = {}
        for entry in sorted(path.iterdir()):
            if entry.is_file() and entry.suffix in self._endings:
                found.setdefault(entry.stem, {})["1"] = entry
            elif entry.is_dir():
                versions = [("1", entry), *((e.name, e) for e in entry.iterdir() if e.name.isdigit())]
                for version, folder in sorted(versions, key=lambda item: version_order(item[0])):
                    file = next((f for f in (folder / f"model{e}" for e in self._endings) if f.is_file()), None)
                    if file is not None:
                        found.setdefault(entry.name, {})[version] = file
        return found

    def find(self, name: str, version: str) -> Path:
        """Return a model's file. Raises NotFound."""
        file = self.scan().get(name, {}).get(version)
        if file is None:
            raise NotFound(f'the repository holds no version {version} of model "{name[:80]}"')
        return file

    def options(self, name: str, default: ModelOptions) -> ModelOptions:
        """Return how a model wants to be served; what its folder does not say is as in `default`. Raises SpecError."""
        return read_options(self._path / name, default)


def version_order(version: str) -> tuple[int, str]:
    """Return what versions are sorted by: as numbers."""
    return (int(version), version) if version.isdigit() else (-1, version)
