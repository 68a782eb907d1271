import hashlib
import json
import os
import shutil
import tarfile

import pytest

from tenure.images.oci import OciSpec, image_id, write_oci

SPEC = OciSpec(tag="tenure/small:1", entry=("/bin/run", "-x"), env={"B": "2", "A": "1"}, workdir="/srv", ports=(8000,))


def make(folder, *, backwards=False, when=0):
    """Make the same tree in one of two orders, with other times and modes."""
    names = ["a/x", "b/y", "c"]
    for name in reversed(names) if backwards else names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 1000)
        os.chmod(path, 0o600 if backwards else 0o644)
        os.utime(path, (when, when))
    (folder / "l").symlink_to("a/x")
    (folder / "tmp").mkdir()
    os.chmod(folder / "c", 0o700 if backwards else 0o755)
    return folder


def test_the_same_tree_gives_the_same_bytes_whenever_and_however_it_was_made(tmp_path):
    ids = [
        write_oci(make(tmp_path / "one"), tmp_path / "1.tar", SPEC),
        write_oci(make(tmp_path / "two", backwards=True, when=1e9), tmp_path / "2.tar", SPEC),
    ]
    assert ids[0] == ids[1] == image_id(tmp_path / "1.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    (tmp_path / "one" / "b" / "y").write_text("other")
    assert write_oci(tmp_path / "one", tmp_path / "1.tar", SPEC) != ids[0]


def test_every_blob_has_its_hash_for_a_name_and_both_formats_name_the_same_ones(tmp_path):
    write_oci(make(tmp_path / "t"), tmp_path / "i.tar", SPEC)
    with tarfile.open(tmp_path / "i.tar") as archive:
        content = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}
    blobs = {name.rpartition("/")[2]: data for name, data in content.items() if name.startswith("blobs/")}
    assert len(blobs) == 3
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in blobs.items())
    (docker,) = json.loads(content["manifest.json"])
    (index,) = json.loads(content["index.json"])["manifests"]
    manifest = json.loads(blobs[index["digest"].removeprefix("sha256:")])
    assert docker["Config"] == f"blobs/sha256/{manifest['config']['digest'].removeprefix('sha256:')}"
    assert docker["Layers"] == [f"blobs/sha256/{layer['digest'].removeprefix('sha256:')}" for layer in manifest["layers"]]
    config = json.loads(content[docker["Config"]])
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert config["config"]["Env"] == ["A=1", "B=2"]
    assert config["config"]["Entrypoint"] == ["/bin/run", "-x"]


def test_files_are_roots_of_1970_and_readable_by_all(tmp_path):
    write_oci(make(tmp_path / "t", backwards=True), tmp_path / "i.tar", SPEC)
    with tarfile.open(tmp_path / "i.tar") as archive:
        layer = json.load(archive.extractfile("manifest.json"))[0]["Layers"][0]
        with tarfile.open(fileobj=archive.extractfile(layer)) as inner:
            members = {member.name: member for member in inner.getmembers()}
    assert list(members) == sorted(members)
    assert {(m.uid, m.gid, m.uname, m.mtime) for m in members.values()} == {(0, 0, "", 0)}
    assert members["b/y"].mode == 0o644
    assert members["c"].mode == 0o755
    assert members["tmp"].mode == 0o1777
    assert members["l"].linkname == "a/x"


def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    make(tmp_path / "t")
    monkeypatch.setattr("tenure.images.oci._write_layer", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_oci(tmp_path / "t", tmp_path / "i.tar", SPEC)
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.real
@pytest.mark.docker
def test_an_engine_takes_it_under_our_id_and_a_lease_runs_it(docker, tmp_path):
    from tests.contracts.runtime_contract import Bench
    from tests.runtimes.test_rooted import make_root

    from tenure.errors import SpecError
    from tenure.protocols import ExitKind
    from tenure.runtimes.container import ContainerRuntime

    for name in ("dev", "proc", "run", "sys", "tmp"):
        (tmp_path / "t" / name).mkdir(parents=True)
    make_root(tmp_path / "t")
    image = tmp_path / "image"
    image.mkdir()
    made = write_oci(tmp_path / "t", image / "image.oci.tar", OciSpec(tag="tenure/small:2", entry=("/bin/sh",), workdir="/srv"))
    record = {"path": "image.oci.tar", "size_bytes": 1, "sha256": "0" * 64, "details": {"image_id": made}}
    manifest = {"name": "small", "entry": ["/bin/sh"], "workdir": "/srv", "forms": {"oci": record}}
    (image / "image.json").write_text(json.dumps(manifest))
    runtime = ContainerRuntime(tmp_path / "state", socket=str(docker.socket))
    try:
        bench = Bench(runtime, tmp_path / "work")
        spec = {"image": str(image), "network": "tenant:alice", "env": {"PATH": "/bin"}}
        handle = bench.start("/bin/sh", "-c", 'cat word; touch "$TENURE_WORKER_DIR/made"; touch /srv/no', **spec)
        assert bench.end(handle).kind is ExitKind.FAILED  # by the last command: the root is only to be read
        assert "hello from inside" in bench.log(handle)
        assert (bench.folder / "lease-1" / "1" / "made").exists()
        assert json.loads(docker.ask("GET", f"/images/{made}/json")[1])["RepoTags"] == ["tenure/small:2"]
        docker.ask("DELETE", f"/images/{made}?force=1")
        size = os.path.getsize(image / "image.oci.tar")
        os.truncate(image / "image.oci.tar", size // 2)
        with pytest.raises(SpecError, match="Build the image anew"):
            bench.start("/bin/sh", lease="lease-2", **spec)
    finally:
        for lease_id in runtime.known():
            runtime.forget(lease_id)
        runtime.close()
        docker.ask("DELETE", f"/images/{made}?force=1")
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
