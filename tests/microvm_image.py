"""A small image of form microvm for tests: this Python, a shell, a few programs. Needs mksquashfs and a kernel."""

import hashlib
import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tenure import codec
from tenure.closures import Closure, ClosureFile, FileKind
from tenure.errors import TenureError
from tenure.forms import LOCK_FILE, MANIFEST_FILE, Form, ImageManifest
from tenure.images.lock import write_lock
from tenure.images.microvm import build_microvm, check_tools
from tenure.images.microvm_kernel import find_kernel
from tenure.runtimes.microvm_machine import QEMU

ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / ".cache/guest"
PYTHON = "/usr/bin/python3"
TOOLS = ("sh", "cat", "seq", "setsid", "sleep", "true")
MODULES = "json os time mmap socket socketserver http.server encodings.idna encodings.utf_8 threading subprocess"


def missing():
    """Return why no guest can be booted here; empty when one can."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU} here: run tools/guest.sh as root"
    try:
        check_tools()
        if find_kernel(KERNEL).modules is None:
            return f"no modules beside the kernel in {KERNEL}: run tools/guest.sh"
    except TenureError as error:
        return f"{error}: run tools/guest.sh"
    return ""


def python_tree(tree):
    """Lay out the interpreter, the modules that tests use, a shell and tools, and the libraries that these need."""
    python = Path(os.path.realpath(sys.executable))
    objects = [_copy(python, tree, PYTHON)]
    library = f"/usr/lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    say = "print('\\n'.join(str(getattr(module, '__file__', '')) for module in sys.modules.values()))"
    code = f"import sys, {', '.join(MODULES.split())}\n{say}"
    listed = subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    stdlib = Path(os.path.dirname(os.__file__))
    for name in listed:
        path = Path(name)
        if not path.is_relative_to(stdlib):
            continue
        inside = f"{library}/{path.relative_to(stdlib)}"
        copied = _copy(path, tree, inside)
        if path.suffix == ".py":
            cached = importlib.util.cache_from_source(str(copied))
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(copied), cached, dfile=inside, doraise=True, invalidation_mode=mode)
        else:
            objects.append(copied)
    (tree / library[1:] / "lib-dynload").mkdir(exist_ok=True)
    objects += [_copy(Path(shutil.which(tool)), tree, f"/bin/{tool}") for tool in TOOLS if shutil.which(tool)]
    found = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True, check=False).stdout
    for path in sorted(set(re.findall(r"(/\S+) \(0x", found))):
        if not (tree / path[1:]).exists():
            _copy(Path(path), tree, path)


def _copy(source, tree, inside):
    target = tree / inside.strip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    return target


def make_image(folder, tree, *, kernel=KERNEL, name="guest"):
    """Build form microvm of a tree and its manifest in an image's folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    record = build_microvm(tree, folder / "microvm", kernel=find_kernel(kernel))
    env = {"PATH": "/usr/bin:/bin", "PYTHONHOME": "/usr"}
    closure = closure_of(tree)
    write_lock(closure, folder / LOCK_FILE)
    manifest = ImageManifest(
        name=name, id="0" * 64, closure_hash=closure.hash, entry=(PYTHON,), env=env, forms={Form.MICROVM: record}
    )
    (folder / MANIFEST_FILE).write_text(json.dumps(codec.to_builtins(manifest)))
    return folder


def closure_of(tree):
    """Return what lies in a tree as a closure."""
    files = []
    for path in sorted(tree.rglob("*")):
        inside = f"/{path.relative_to(tree)}"
        if path.is_dir():
            files.append(ClosureFile(path=inside, kind=FileKind.DIRECTORY, mode=0o755))
        else:
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            files.append(ClosureFile(path=inside, kind=FileKind.FILE, mode=0o755, size_bytes=len(data), sha256=sha256))
    return Closure(program=(PYTHON,), workdir="/", files=tuple(sorted(files, key=lambda file: file.path)))
