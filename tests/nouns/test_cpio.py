"""An archive holds what was put into it, in the form that the kernel reads."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.cpio import Archive

NAMES = st.lists(
    st.text("abcde.-_", min_size=1, max_size=8).filter(lambda name: name not in (".", "..")), min_size=1, max_size=4
)


def read(data):
    """Return name -> (mode, content, device) of a newc archive, up to its end mark."""
    at, found = 0, {}
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, size, device, length = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = data[at + 110 : at + 110 + length - 1].decode()
        start = (at + 110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = (mode, data[start : start + size], device)
        at = (start + size + 3) // 4 * 4


@given(st.dictionaries(NAMES.map("/".join), st.binary(max_size=50), max_size=6))
def test_what_is_put_in_is_read_again_and_the_same_parts_give_the_same_bytes(files):
    kept = {name: data for name, data in files.items() if not any(other.startswith(f"{name}/") for other in files)}
    archives = []
    for _ in range(2):
        archive = Archive()
        for name, data in kept.items():
            archive.file(name, data)
        archives.append(archive.to_bytes())
    found = read(archives[0])
    assert archives[0] == archives[1]
    assert len(archives[0]) % 512 == 0
    assert {name: data for name, (mode, data, _) in found.items() if stat.S_ISREG(mode)} == kept
    for name in kept:
        for end, letter in enumerate(name):
            assert letter != "/" or stat.S_ISDIR(found[name[:end]][0])


def test_links_and_devices_are_what_they_are_and_no_name_comes_twice():
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.link("bin", "usr/bin")
    found = read(archive.to_bytes())
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert found["bin"][1] == b"usr/bin"
    with pytest.raises(ValueError, match="in the archive already"):
        archive.file("bin", b"")
