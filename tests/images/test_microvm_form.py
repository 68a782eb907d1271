"""Form microvm: the same tree gives the same bytes, and what is missing for it is said."""

import os
import shutil
import subprocess

import pytest
from tests import microvm_image

from tenure.cli.image_builds import check_kernel
from tenure.errors import CorruptData, NotFound, SpecError, Unsupported
from tenure.forms import Form
from tenure.images import microvm
from tenure.images.microvm import build_microvm, first_program
from tenure.images.microvm_kernel import MODULES, bootable, find_kernel, read_modules


def small_tree(place, *, mtime_s):
    (place / "usr/bin").mkdir(parents=True)
    (place / "usr/bin/program").write_bytes(bytes(range(256)) * 100)
    (place / "bin").symlink_to("usr/bin")
    for path in (place, *place.rglob("*")):
        os.utime(path, (mtime_s, mtime_s), follow_symlinks=False)
    return place


@pytest.mark.real
def test_trees_that_differ_in_times_and_place_give_the_same_bytes(tmp_path):
    if why := microvm_image.missing():
        pytest.skip(why)
    kernel = find_kernel(microvm_image.KERNEL)
    records = [
        build_microvm(small_tree(tmp_path / name / "tree", mtime_s=mtime_s), tmp_path / name / "form", kernel=kernel)
        for name, mtime_s in (("a", 1), ("elsewhere", 1_700_000_000))
    ]
    assert records[0] == records[1]
    assert sorted(path.name for path in (tmp_path / "a/form").iterdir()) == ["initrd", "kernel", "root.squashfs"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["form", "tree"], "no draft is left"
    if os.geteuid() == 0:
        os.chown(tmp_path / "a/tree/usr/bin/program", 1000, 1000)
        assert build_microvm(tmp_path / "a/tree", tmp_path / "a/form", kernel=kernel) == records[0]


def test_without_a_kernel_or_mksquashfs_the_form_says_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="apt-get download"):
        find_kernel(tmp_path, home=tmp_path)
    with pytest.raises(NotFound, match=f"mkdir -p {tmp_path}/kernels/debian"):
        find_kernel(tmp_path / "none", home=tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="squashfs-tools"):
        microvm.check_tools()


def test_a_kernel_without_a_module_that_guests_need_is_refused_and_one_built_in_is_left_out(tmp_path):
    modules = tmp_path / "lib/modules/1.0"
    (modules / "kernel").mkdir(parents=True)
    (tmp_path / "vmlinuz-1.0").write_bytes(b"no kernel")
    kernel = find_kernel(tmp_path)
    assert (kernel.release, kernel.modules) == ("1.0", modules)
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    (modules / "kernel/virtio-net.ko").write_bytes(b"module")
    assert read_modules(kernel, ("virtio", "virtio_net")) == [("virtio_net.ko", b"module")]
    with pytest.raises(NotFound, match="no module squashfs"):
        read_modules(kernel, ("squashfs",))
    with pytest.raises(CorruptData, match="neither a Linux bzImage nor an ELF"):
        bootable(kernel.image)


def test_a_kernel_that_was_given_is_looked_at_before_anything_is_built(tmp_path):
    (tmp_path / "vmlinuz-1.0").write_bytes(b"no kernel")
    check_kernel(None, (Form.ROOT,))
    with pytest.raises(SpecError, match="Add microvm"):
        check_kernel(tmp_path, (Form.ROOT, Form.OCI))
    with pytest.raises(NotFound, match="no kernel at"):
        check_kernel(tmp_path / "none", (Form.MICROVM,))
    with pytest.raises(SpecError, match="has no modules beside it"):
        check_kernel(tmp_path, (Form.MICROVM,))
    modules = tmp_path / "lib/modules/1.0"
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.builtin").write_text("\n".join(f"kernel/{name}.ko" for name in MODULES))
    check_kernel(tmp_path, (Form.MICROVM,))


def test_the_first_program_is_a_static_one_and_its_source_builds_to_the_like(tmp_path):
    shipped = first_program()
    assert shipped[:4] == b"\x7fELF"
    assert len(shipped) < 16384
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here")
    script = os.path.join(os.path.dirname(microvm.__file__), "../data/microvm/build.sh")
    done = subprocess.run(["sh", script, str(tmp_path / "init")], capture_output=True, text=True, check=False)
    if done.returncode and "No such file" in done.stderr:
        pytest.skip(f"the kernel's headers are not here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    built = (tmp_path / "init").read_bytes()
    words = (b"token", b"module=", b"/proc/vmstat", b"oom_kill ", b"noexec", b"/dev/vda")
    assert all(word in built and word in shipped for word in words)
    assert abs(len(built) - len(shipped)) < 4096, "the built one is another program than the shipped"
