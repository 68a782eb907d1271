"""The store's file operations on a disk in memory: for tests that need many thousand stores a minute. See test_files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tenure.train.files import Files


class Inode:
    """Content under one or more names."""

    __slots__ = ("content", "links")

    def __init__(self, content: bytes) -> None:
        self.content, self.links = content, 1


class Disk:
    """Folders that several `MemoryFiles` share. Each operation on it is one step, as on a real file system."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Inode]] = {}
        self.temps = 0
        """Temporary names given out."""

    def at(self, path: Path) -> tuple[dict[str, Inode], str]:
        """Return the folder that a path lies in, and its name there. Raises FileNotFoundError without the folder."""
        folder, _, name = str(path).rpartition("/")
        try:
            return self.folders[folder], name
        except KeyError:
            raise FileNotFoundError(f"no folder {folder}") from None


class MemoryFiles(Files):
    """`Files` on a `Disk`.

    lost_answer: asked at each LINK that succeeds; True: its answer is lost on the way, and the client, asking again, finds
    the name taken by its own file.
    """

    def __init__(self, disk: Disk, *, lost_answer: Callable[[], bool] = lambda: False) -> None:
        self.disk = disk
        self._lost_answer = lost_answer

    def read(self, path: Path, offset: int = 0, size: int = -1) -> bytearray:
        """See Files."""
        content = self._inode(path).content
        return bytearray(content[offset:] if size < 0 else content[offset : offset + size])

    def replace(self, path: Path, content: bytes) -> None:
        """See Files."""
        folder, name = self.disk.at(path)
        if (old := folder.get(name)) is not None:
            old.links -= 1
        folder[name] = Inode(content)

    def link(self, temp: Path, path: Path) -> bool:
        """See Files."""
        inode = self._inode(temp)
        folder, name = self.disk.at(path)
        if name not in folder:
            inode.links += 1
            folder[name] = inode
            if not self._lost_answer():
                return True
        return self._inode(temp).links > 1

    def move(self, source: Path, target: Path) -> bool:
        """See Files."""
        try:
            folder, name = self.disk.at(source)
            into, new_name = self.disk.at(target)
        except FileNotFoundError:
            return False
        if name not in folder:
            return False
        if (old := into.get(new_name)) is folder[name]:
            return True  # rename(2): two names of one file stay as they are
        if old is not None:
            old.links -= 1
        into[new_name] = folder.pop(name)
        return True

    def remove(self, path: Path) -> None:
        """See Files."""
        try:
            folder, name = self.disk.at(path)
        except FileNotFoundError:
            return
        if (inode := folder.pop(name, None)) is not None:
            inode.links -= 1

    def names(self, folder: Path, *, hidden: bool = False) -> list[str]:
        """See Files."""
        return sorted(name for name in self.disk.folders.get(str(folder), ()) if hidden or name[0] != ".")

    def exists(self, path: Path) -> bool:
        """See Files."""
        folder, _, name = str(path).rpartition("/")
        return name in self.disk.folders.get(folder, ()) or str(path) in self.disk.folders

    def make_folder(self, path: Path) -> None:
        """See Files."""
        at = str(path)
        while at and at not in self.disk.folders:
            self.disk.folders[at] = {}
            at = at.rpartition("/")[0]

    def _temp(self, path: Path) -> Path:
        self.disk.temps += 1
        return path.with_name(f".{path.name}.{self.disk.temps}")

    def _write(self, temp: Path, pieces: Iterable[bytes | memoryview], durable: bool) -> None:
        folder, name = self.disk.at(temp)
        if name in folder:
            raise FileExistsError(f"{temp} exists")
        folder[name] = Inode(b"".join(pieces))

    def _inode(self, path: Path) -> Inode:
        folder, name = self.disk.at(path)
        try:
            return folder[name]
        except KeyError:
            raise FileNotFoundError(f"no file {path}") from None
