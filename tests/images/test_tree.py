import os
from pathlib import Path

import pytest

from tenure.closures import Closure, ClosureFile, FileKind
from tenure.errors import CorruptData, SpecError
from tenure.images import tree


@pytest.fixture
def closure(tmp_path):
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    (source / "bin" / "run").write_bytes(b"#!run")
    os.chmod(source / "bin" / "run", 0o700)
    (source / "data").write_bytes(b"data")
    os.chmod(source / "data", 0o600)
    (source / "link").symlink_to("bin/run")
    return closure_of(source)


def closure_of(source, **fields):
    """Return the closure of a folder as if its files had been traced."""
    parents = [str(path) for path in reversed(source.parents)][1:]
    files = [ClosureFile(path=path, kind=FileKind.DIRECTORY, mode=0o755) for path in (*parents, str(source))]
    files += [
        ClosureFile(
            path=f"{source}{entry.path}",
            kind=entry.kind,
            mode=entry.mode,
            size_bytes=entry.size_bytes,
            sha256=entry.sha256,
            target=entry.target,
        )
        for entry in tree.scan(source)
    ]
    return Closure(program=(f"{source}/bin/run",), workdir="/srv", files=tuple(sorted(files, key=lambda f: f.path)), **fields)


def elsewhere(closure, folder):
    """Return the closure as if its files lay in `folder` inside of the image, and where each really lies."""
    root = next(file.path for file in closure.files if file.path.endswith("/source"))
    files, sources = [ClosureFile(path=folder, kind=FileKind.DIRECTORY, mode=0o755)], {}
    for file in closure.files:
        if file.path.startswith(f"{root}/"):
            path = folder + file.path.removeprefix(root)
            sources[path] = Path(file.path)
            fields = {name: getattr(file, name) for name in ("kind", "mode", "size_bytes", "sha256", "target")}
            files.append(ClosureFile(path=path, **fields))
    return Closure(program=(f"{folder}/bin/run",), workdir="/srv", files=tuple(sorted(files, key=lambda f: f.path))), sources


def test_a_tree_has_the_files_with_plain_modes_and_directories_of_its_own(closure, tmp_path):
    inside, sources = elsewhere(closure, "/app")
    old = os.umask(0o077)
    try:
        tree.make_tree(inside, tmp_path / "t", sources=sources)
    finally:
        os.umask(old)
    found = {entry.path: entry for entry in tree.scan(tmp_path / "t")}
    assert {path for path in found if path.count("/") == 1} == {"/app", "/dev", "/proc", "/run", "/srv", "/sys", "/tmp"}
    assert found["/app/bin/run"].mode == 0o755
    assert found["/app/data"].mode == 0o644
    assert found["/app"].mode == 0o755
    assert found["/app/link"].target == "bin/run"
    assert tree.tree_bytes(tmp_path / "t") == 9


def test_a_file_that_changed_since_is_refused(closure, tmp_path):
    inside, sources = elsewhere(closure, "/app")
    sources["/app/data"].write_bytes(b"else")
    with pytest.raises(CorruptData, match="has changed since it was analysed"):
        tree.make_tree(inside, tmp_path / "t", sources=sources)
    sources["/app/data"].unlink()
    with pytest.raises(CorruptData, match="is gone since it was analysed"):
        tree.make_tree(inside, tmp_path / "u", sources=sources)


def test_what_lies_under_tmp_cannot_be_in_an_image(closure, tmp_path):
    inside, sources = elsewhere(closure, "/tmp/app")
    with pytest.raises(SpecError, match="Move the program"):
        tree.make_tree(inside, tmp_path / "t", sources=sources)


def test_a_changed_file_of_a_clone_leaves_the_first_tree_alone(closure, tmp_path):
    inside, sources = elsewhere(closure, "/app")
    tree.make_tree(inside, tmp_path / "t", sources=sources)
    before = tree.scan(tmp_path / "t")
    tree.clone_tree(tmp_path / "t", tmp_path / "u")
    assert tree.scan(tmp_path / "u") == before
    tree.replace_file(tmp_path / "u" / "app" / "bin" / "run", b"new")
    assert tree.scan(tmp_path / "t") == before
    assert (tmp_path / "u" / "app" / "bin" / "run").read_bytes() == b"new"
    assert os.stat(tmp_path / "u" / "app" / "bin" / "run").st_mode & 0o777 == 0o755
