"""What never becomes part of a closure, and why: what is the machine's, not the program's.

A rule yields to what the user adds by name and to the program's own folders: a program that lives in /tmp is no junk there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

BYTECODE = "bytecode, which is made anew from its source"

_TREES = {
    "/proc": "the kernel's own, there is one in every form",
    "/sys": "the kernel's own, there is one in every form",
    "/dev": "devices, which each form has of its own",
    "/run": "state of this machine's running services",
    "/var/run": "state of this machine's running services",
    "/tmp": "temporary, each form has an empty one",
    "/var/tmp": "temporary, each form has an empty one",
    "/var/cache": "a cache of this machine",
    "/lost+found": "this machine's file system",
}
_FILES = {
    "/etc/ld.so.cache": "this machine's list of libraries; those needed are found without it",
    "/etc/ld.so.preload": "this machine's own setting",
    "/etc/resolv.conf": "this machine's name servers, which each form has of its own",
    "/etc/hostname": "this machine's name",
    "/etc/machine-id": "this machine's identity",
}
_SECRETS = re.compile(
    r"/\.(?:ssh|aws|gnupg|kube|azure)(?:/|$)|/\.(?:netrc|pypirc|pgpass|git-credentials)$|/\.docker/config\.json$"
    r"|/\.config/gcloud(?:/|$)|^/etc/(?:g?shadow-?|sudoers)$|/\.env$|/id_(?:rsa|dsa|ecdsa|ed25519)$|\.(?:key|p12|pfx)$"
)
SECRET = "may be a secret"
_CACHE = "a cache; what is read from it must be added by name"


@dataclass(frozen=True, slots=True)
class Rules:
    """Which paths are left out of one closure."""

    own: tuple[str, ...] = ()
    """Folders and files of the program, of its interpreter and of what the user added: no tree rule holds within them."""
    home: str = ""
    """Home folder of who analyses; its ``.cache`` is a cache."""
    keep_linker_cache: bool = False
    """A library is found by nothing else."""

    def left_out(self, path: str) -> str:
        """Return why a path, absolute and without links, is left out; empty: it is not."""
        parts = path.split("/")
        if "__pycache__" in parts:
            return BYTECODE
        if ".git" in parts:
            return "history of sources"
        if path in _FILES:
            return "" if self.keep_linker_cache and path == "/etc/ld.so.cache" else _FILES[path]
        if self.is_own(path):
            return "" if path in self.own or not _SECRETS.search(path) else SECRET
        if _SECRETS.search(path):
            return SECRET
        for tree, why in _TREES.items():
            if path.startswith(tree + "/"):
                return why
        if self.home and path.startswith(os.path.join(self.home, ".cache") + "/"):
            return _CACHE
        return ""

    def is_own(self, path: str) -> bool:
        """Whether a path is, or lies within, something of the program."""
        return any(path == own or path.startswith(own.rstrip("/") + "/") for own in self.own)


def own_folders(paths: Sequence[str]) -> tuple[str, ...]:
    """Return those that can count as the program's: a root of the system, or a whole temporary folder, never does."""
    never = {"", "/", *_TREES, "/usr", "/etc", "/var", "/home", "/root", os.path.expanduser("~")}
    return tuple(sorted({os.path.realpath(path) for path in paths if path} - never))
