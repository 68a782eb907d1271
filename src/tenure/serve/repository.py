"""The models of one server: found in a folder or given as one file, loaded once, looked up by name and version.

Layouts: FILE; DIR/NAME.onnx; DIR/NAME/model.onnx; DIR/NAME/VERSION/model.onnx (VERSION a whole number; the highest is
served when none is asked for). Not here yet: load, unload and swap while serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import NotFound, SpecError
from tenure.serve.engines import ENGINES, Engine, load_engine
from tenure.serve.tensors import ModelMetadata


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One instance of one version of a model."""

    name: str
    version: str
    engine: Engine


class Repository:
    """Loaded models by name and version."""

    def __init__(self, models: Mapping[str, Mapping[str, Path]], *, threads: int = 1) -> None:
        """Load every file. models: name → version → file. Raises NotFound, SpecError, MissingExtra."""
        self._models: dict[str, dict[str, LoadedModel]] = {}
        for name, versions in models.items():
            ordered = sorted(versions, key=_version_order)
            self._models[name] = {v: LoadedModel(name, v, load_engine(versions[v], threads=threads)) for v in ordered}

    def names(self) -> list[str]:
        """Return the names of all models."""
        return list(self._models)

    def all(self) -> list[LoadedModel]:
        """Return every version of every model."""
        return [model for versions in self._models.values() for model in versions.values()]

    def find(self, name: str, version: str = "") -> LoadedModel:
        """Return a model; without version the highest. Raises NotFound naming what there is."""
        versions = self._models.get(name)
        if versions is None:
            raise NotFound(f'there is no model "{name[:80]}"; served here: {", ".join(self._models)}')
        if not version:
            return next(reversed(versions.values()))
        if version not in versions:
            raise NotFound(f'model "{name}" has no version "{version[:80]}"; there are: {", ".join(versions)}')
        return versions[version]

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Return what a model takes and gives. Raises NotFound."""
        model = self.find(name, version)
        engine = model.engine
        return ModelMetadata(
            name=name,
            versions=tuple(self._models[name]),
            platform=engine.platform,
            inputs=engine.inputs,
            outputs=engine.outputs,
        )

    def close(self) -> None:
        """Free all models."""
        for model in self.all():
            model.engine.close()


def find_models(path: Path, *, name: str = "") -> dict[str, dict[str, Path]]:
    """Return the model files under a path: name → version → file.

    name: for a single file; else its stem. Raises NotFound for a missing path, SpecError when nothing is found there.
    """
    if path.is_file():
        return {name or path.stem: {"1": path}}
    if not path.is_dir():
        raise NotFound(f"there is no model file or folder {path}")
    found: dict[str, dict[str, Path]] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_file() and entry.suffix in ENGINES:
            found.setdefault(entry.stem, {})["1"] = entry
        elif entry.is_dir():
            for version, folder in (("1", entry), *((e.name, e) for e in sorted(entry.iterdir()) if e.name.isdigit())):
                file = next((folder / f"model{ending}" for ending in ENGINES if (folder / f"model{ending}").is_file()), None)
                if file is not None:
                    found.setdefault(entry.name, {})[version] = file
    if not found:
        raise SpecError(f"no model in {path}: expected NAME.onnx, NAME/model.onnx or NAME/VERSION/model.onnx (or .skops)")
    return found


def _version_order(version: str) -> tuple[int, str]:
    return (int(version), version) if version.isdigit() else (-1, version)
