"""Form `oci`: an archive that Docker and Podman load, written here, byte for byte the same for the same tree.

    image.oci.tar
      blobs/sha256/<digest>    layer (a tar of the tree), configuration, manifest
      index.json, oci-layout   OCI image layout 1.0, for Podman, skopeo and new engines
      manifest.json            Docker's own archive format, for every Docker since 1.10; it points at the same blobs

No engine takes part, no registry, no clock: entries are sorted, of 1970, root's, and modes are as the tree has them.
Sources: OCI Image Format Specification 1.0; Docker image specification 1.2. Not for: loading it (`runtimes.container`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tenure.images.tree import walk

EPOCH = "1970-01-01T00:00:00Z"
USER = "65532:65532"
"""Who the program is unless an engine is told otherwise: nobody's number, as in other images without a distribution."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class OciSpec:
    """What the archive says beside its files."""

    tag: str
    """Under which the engine knows it: ``name:tag``."""
    entry: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    ports: Sequence[int] = ()
    machine: str = "x86_64"
    """As the kernel calls it."""
    labels: Mapping[str, str] = field(default_factory=dict)


def write_oci(tree: Path, path: Path, spec: OciSpec) -> str:
    """Write the archive of a tree, whole or not at all; return the image's id as engines name it, ``sha256:…``.

    Raises OSError.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as layer, part.open("wb") as whole:
            digest, size_bytes = _write_layer(tree, layer)
            config = _json(_config(spec, digest))
            manifest = _json(_manifest(config, digest, size_bytes))
            with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as archive:
                blobs: dict[str, bytes | IO[bytes]] = {_sha256(config): config, _sha256(manifest): manifest, digest: layer}
                _add(archive, "blobs/", None)
                _add(archive, "blobs/sha256/", None)
                for name, blob in sorted(blobs.items()):
                    _add(archive, f"blobs/sha256/{name}", blob, size_bytes)
                _add(archive, "index.json", _json(_index(spec, manifest)))
                _add(archive, "manifest.json", _json(_docker_manifest(spec, config, digest)))
                _add(archive, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return f"sha256:{_sha256(config)}"


def image_id(path: Path) -> str:
    """Return the id that an engine gives the image in an archive. Raises OSError, KeyError, ValueError for another file."""
    with tarfile.open(path) as archive:
        stream = archive.extractfile("manifest.json")
        assert stream is not None
        name = str(json.loads(stream.read())[0]["Config"])
    return f"sha256:{name.rpartition('/')[2].removesuffix('.json')}"


def _write_layer(tree: Path, stream: IO[bytes]) -> tuple[str, int]:
    """Write a tree as a tar; return its SHA-256 and size."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for inside, path in walk(tree):
            info = os.lstat(path)
            member = tarfile.TarInfo(inside.lstrip("/"))
            member.mode = _mode(inside, info.st_mode)
            if stat.S_ISLNK(info.st_mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
                archive.addfile(member)
            elif stat.S_ISDIR(info.st_mode):
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.size = info.st_size
                with path.open("rb") as content:
                    archive.addfile(member, content)
    stream.seek(0)
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest(), stream.tell()


def _mode(inside: str, mode: int) -> int:
    if stat.S_ISLNK(mode):
        return 0o777
    if inside in ("/tmp", "/run"):
        return 0o1777
    return 0o755 if stat.S_ISDIR(mode) or mode & 0o111 else 0o644


def _config(spec: OciSpec, layer: str) -> dict[str, Any]:
    container = {
        "Entrypoint": list(spec.entry),
        "Env": [f"{name}={value}" for name, value in sorted(spec.env.items())],
        "ExposedPorts": {f"{port}/tcp": {} for port in sorted(spec.ports)},
        "Labels": dict(sorted(spec.labels.items())),
        "StopSignal": "SIGTERM",
        "User": USER,
        "WorkingDir": spec.workdir,
    }
    return {
        "architecture": _ARCHITECTURES.get(spec.machine, spec.machine),
        "config": {name: value for name, value in container.items() if value},
        "created": EPOCH,
        "history": [{"created": EPOCH, "created_by": "tenure image build"}],
        "os": "linux",
        "rootfs": {"diff_ids": [f"sha256:{layer}"], "type": "layers"},
    }


def _manifest(config: bytes, layer: str, size_bytes: int) -> dict[str, Any]:
    return {
        "config": {"digest": f"sha256:{_sha256(config)}", "mediaType": _CONFIG, "size": len(config)},
        "layers": [{"digest": f"sha256:{layer}", "mediaType": _LAYER, "size": size_bytes}],
        "mediaType": _MANIFEST,
        "schemaVersion": 2,
    }


def _index(spec: OciSpec, manifest: bytes) -> dict[str, Any]:
    name, _, tag = spec.tag.rpartition(":")
    return {
        "manifests": [
            {
                "annotations": {
                    "io.containerd.image.name": f"docker.io/{name}:{tag}",
                    "org.opencontainers.image.ref.name": tag,
                },
                "digest": f"sha256:{_sha256(manifest)}",
                "mediaType": _MANIFEST,
                "size": len(manifest),
            }
        ],
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "schemaVersion": 2,
    }


def _docker_manifest(spec: OciSpec, config: bytes, layer: str) -> list[dict[str, Any]]:
    return [{"Config": f"blobs/sha256/{_sha256(config)}", "Layers": [f"blobs/sha256/{layer}"], "RepoTags": [spec.tag]}]


def _add(archive: tarfile.TarFile, name: str, content: bytes | IO[bytes] | None, size_bytes: int = 0) -> None:
    """Add a member: bytes, an open file of `size_bytes`, or for None a directory."""
    member = tarfile.TarInfo(name.rstrip("/"))
    if content is None:
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(member)
        return
    member.mode = 0o644
    stream: IO[bytes] = io.BytesIO(content) if isinstance(content, bytes) else content
    member.size = len(content) if isinstance(content, bytes) else size_bytes
    stream.seek(0)
    archive.addfile(member, stream)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
