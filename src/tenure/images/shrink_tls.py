"""OpenSSL in a program that never speaks TLS: 5 MB that asyncio and uvloop import, and a server on plain HTTP does not use.

The module `_ssl` is replaced by a stand-in in Python with the same names and numbers: `import ssl` works, and whoever makes a
context is told by an OSError what is missing. `hashlib` goes over to the interpreter's own hash functions, which give the same
bytes. Only for modules of the very interpreter that builds; another's are left alone.
Not for: programs that use TLS; the answers tell, and the step is dropped.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from tenure.images.shrink_elf import cut_off, elf_files, remove_needless
from tenure.images.shrink_python import compiled
from tenure.images.tree import replace_file, walk

SAID = "this image was built without TLS, as no exercise came to use it: build it anew with one that does, or with --keep tls"
_MODULES = re.compile(r"/lib-dynload/(_ssl|_hashlib)\.[^/]*\.so$")
_LIBRARIES = re.compile(r"/lib(?:ssl|crypto)\.so[^/]*$")
_HASHES = ("_md5", "_sha1", "_sha2", "_sha256", "_sha512", "_sha3", "_blake2")
_PURPOSES = ("1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2")
"""Object identifiers that ssl.py looks up when it is imported."""


class Tls:
    """Replace OpenSSL by a stand-in."""

    name = "OpenSSL"

    def apply(self, tree: Path) -> str:
        """See Step."""
        found = {match[1]: inside for inside, _ in walk(tree) if (match := _MODULES.search(inside))}
        if "_ssl" not in found:
            return "it is not there"
        here = importlib.util.find_spec("_ssl")
        if here is None or os.path.basename(here.origin or "") != os.path.basename(found["_ssl"]):
            return "it belongs to another interpreter than this one"
        folder = tree / os.path.dirname(found["_ssl"]).lstrip("/")
        for inside in found.values():
            (tree / inside.lstrip("/")).unlink()
        code = compiled(stand_in().encode(), f"{os.path.dirname(found['_ssl'])}/_ssl.py")
        assert code is not None
        replace_file(folder / "_ssl.pyc", code)
        os.chmod(folder / "_ssl.pyc", 0o644)
        _add_hashes(folder)
        remove_needless(tree, _LIBRARIES, elf_files(tree))
        return ""


def _add_hashes(folder: Path) -> None:
    """Add the interpreter's own hash functions, which a run with OpenSSL did not come to load."""
    for name in _HASHES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin or not os.path.isfile(spec.origin):
            continue  # built in, or of another version
        place = folder / os.path.basename(spec.origin)
        if not place.exists():
            data = Path(spec.origin).read_bytes()
            place.write_bytes(cut_off(data) or data)
            os.chmod(place, 0o755)


def stand_in() -> str:
    """Return the stand-in's source, made of this interpreter's own `_ssl`."""
    import _ssl

    lines = [
        "import os as _os",
        "def _refuse(*_, **__):",
        f"    raise OSError({SAID!r})",
        "class _Refused:",
        "    def __new__(cls, *_, **__):",
        "        _refuse()",
        "class SSLError(OSError):",
        "    pass",
    ]
    for name in ("SSLZeroReturnError", "SSLWantReadError", "SSLWantWriteError", "SSLSyscallError", "SSLEOFError"):
        lines.append(f"class {name}(SSLError): pass")
    lines.append("class SSLCertVerificationError(SSLError, ValueError): pass")
    known = {line.split()[1].partition("(")[0] for line in lines if line.startswith("class ")}
    for name in sorted(set(dir(_ssl)) - known):
        if not name.startswith("__"):
            lines.append(_line(name, getattr(_ssl, name)))
    identifiers = {text: tuple(_ssl.txt2obj(text, name=False)) for text in _PURPOSES}
    lines += [
        f"_IDENTIFIERS = {identifiers!r}",
        "def txt2obj(txt, name=False):",
        "    return _IDENTIFIERS[txt] if txt in _IDENTIFIERS else _refuse()",
        "def RAND_bytes(n): return _os.urandom(n)",
        "def RAND_pseudo_bytes(n): return (_os.urandom(n), True)",
        "def RAND_status(): return True",
        "def RAND_add(*_): return None",
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    if isinstance(value, (bool, int, str, bytes)) or (
        isinstance(value, tuple) and all(isinstance(part, int) for part in value)
    ):
        return f"{name} = {value!r}"
    if isinstance(value, dict):
        return f"{name} = {{}}"
    return f"class {name}(_Refused): pass" if isinstance(value, type) else f"{name} = _refuse"
