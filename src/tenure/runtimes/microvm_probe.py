"""Whether this processor's own virtualisation boots a guest: tried once a boot of this machine, with the image's own kernel.

A device that can be opened is no proof: some let special guests run only, and others stand still in the middle of a start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

from tenure.runtimes.microvm_config import start_archive
from tenure.runtimes.microvm_image import MicrovmImage
from tenure.runtimes.microvm_machine import kvm_may_be_opened, qemu_command
from tenure.runtimes.state import read_json, write_json

PROBE_MAX_S = 6.0
"""Hardware boots a guest in a quarter of a second."""
_TOKEN = "probe"
_lock = threading.Lock()


def accel_for(image: MicrovmImage, qemu: str, *, state_dir: Path, boot_id: str, max_s: float = PROBE_MAX_S) -> tuple[str, str]:
    """Return ``kvm`` or ``tcg`` for an image, and why. The answer is kept in `state_dir` until this machine's next boot."""
    if not kvm_may_be_opened():
        return "tcg", "/dev/kvm cannot be opened"
    key = hashlib.sha256(f"{boot_id} {qemu} {image.kernel.stat().st_size} {image.kernel}".encode()).hexdigest()[:16]
    path = state_dir / "kvm.json"
    with _lock:
        kept = read_json(path) or {}
        if kept.get("key") != key:
            works, why = _boots(image, qemu, max_s)
            kept = {"key": key, "works": works, "why": why}
            with contextlib.suppress(OSError):
                write_json(path, kept)
    return ("kvm" if kept["works"] else "tcg"), str(kept["why"])


def _boots(image: MicrovmImage, qemu: str, max_s: float) -> tuple[bool, str]:
    """Boot up to the first program under KVM; return whether it spoke, and what was seen."""
    archive = start_archive(
        token=_TOKEN, argv=["/"], env={}, workdir="/", root_type=image.root_type, modules=image.modules, lease=b"{}"
    )
    asked = {
        "qemu": qemu,
        "kernel": str(image.kernel),
        "root": str(image.root),
        "memory_bytes": 128 << 20,
        "cpus": 1,
        "ports": (),
    }
    ours, theirs = socket.socketpair()
    with tempfile.NamedTemporaryFile() as initrd, ours, theirs:
        initrd.write(image.initrd.read_bytes() + archive)
        initrd.flush()
        command = qemu_command(asked, accel="kvm", initrd=initrd.name, qmp_fd=theirs.fileno())
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=max_s, pass_fds=[theirs.fileno()], check=False
            )
            output, words = done.stdout, done.stderr.decode("utf-8", "replace").split("\n")[0].strip()[:120]
        except subprocess.TimeoutExpired as late:
            output, words = late.stdout or b"", f"the guest said nothing within {max_s:g} s"
        except OSError as error:
            return False, f"QEMU could not be started: {error}"
    if b"\x01" + _TOKEN.encode() + b" up" in output:
        return True, "a guest has booted under KVM"
    return False, f"/dev/kvm is there, but no guest boots: {words or 'it ended at once'}"


def describe(state_dir: Path) -> str:
    """Return what is known of this machine's virtualisation, in words."""
    kept = read_json(state_dir / "kvm.json")
    if kept is not None:
        return "hardware virtualisation (KVM)" if kept["works"] else f"software emulation ({kept['why']})"
    if not os.path.exists("/dev/kvm"):
        return "software emulation (no /dev/kvm)"
    return "hardware virtualisation where it boots a guest, else software emulation (tried at the first start)"
