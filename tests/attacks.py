"""Attempts to get out of a lease, run from inside it: for the tests of containers and the benchmark `lease_isolation`.

`program()` is one Python program without packages. It reads its targets (addresses, paths, a secret of this machine) from
TARGETS and prints one JSON line an attempt: name, escaped, why. No attempt harms a machine on which it succeeds.
An attempt that would end the lease (memory, disk) is made by the tests themselves.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any


def _attempts() -> dict[str, Any]:  # its source is what runs inside
    import ctypes
    import os
    import resource
    import socket
    import stat

    targets = json.loads(os.environ["TARGETS"])
    libc = ctypes.CDLL(None, use_errno=True)

    def connects(host, port, family=socket.AF_INET):
        with socket.create_connection((host, port), timeout=1.5) as line:
            line.settimeout(1.5)
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return bool(line.recv(10))

    def text_of(path):
        with open(path) as stream:
            return stream.read()

    def engine_at(path):
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(1.5)
        line.connect(path)
        line.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
        return b"200" in line.recv(100)

    def syscall(number, *arguments):
        """Whether the kernel took it as ours to ask: anything but EPERM, EACCES, ENOSYS."""
        ctypes.set_errno(0)
        return libc.syscall(number, *arguments) != -1 or ctypes.get_errno() not in (1, 13, 38)

    def engine_socket_at_its_usual_place():
        return engine_at("/var/run/docker.sock")

    def engine_socket_where_it_lies():
        return engine_at(targets["socket"])

    def any_socket_that_is_an_engine():
        for top in ("/run", "/var", "/tmp", "/home", os.environ.get("TENURE_WORKER_DIR", "/")):
            for folder, _, names in os.walk(top):
                for name in names:
                    path = f"{folder}/{name}"
                    if stat.S_ISSOCK(os.lstat(path).st_mode) and engine_at(path):
                        return True
        return False

    def engine_over_tcp():
        return connects(targets["gateway"], 2375)

    def other_tenant_by_address():
        return connects(targets["other_address"], targets["other_port"])

    def other_tenant_by_name():
        return connects(targets["other_name"], targets["other_port"])

    def other_tenant_through_its_published_port():
        return connects(targets["gateway"], targets["other_published"])

    def other_tenants_gateway():
        return connects(targets["other_gateway"], targets["host_port"])

    def host_service_at_the_gateway():
        return connects(targets["gateway"], targets["host_port"])

    def host_service_at_its_address():
        return connects(targets["host_address"], targets["host_port"])

    def host_service_on_loopback():
        return connects("127.0.0.1", targets["loopback_port"])

    def host_service_over_udp():
        line = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        line.settimeout(1.5)
        line.sendto(b"x", (targets["gateway"], targets["udp_port"]))
        return bool(line.recv(10))

    def host_service_on_an_abstract_socket():
        line = socket.socket(socket.AF_UNIX)
        line.connect(b"\0" + targets["abstract"].encode())
        return True

    def sniff_the_network():
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        return True

    def forge_packets():
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        return True

    def secret_file_of_the_host():
        return targets["secret"] in text_of(targets["secret_path"])

    def secret_file_through_proc_root():
        return targets["secret"] in text_of(f"/proc/1/root{targets['secret_path']}")

    def accounts_of_the_host():
        return targets["account"] in text_of("/etc/passwd")

    def another_leases_folder():
        return bool(os.listdir(targets["other_folder"]))

    def the_nodes_state():
        return bool(os.listdir(targets["state"]))

    def processes_of_the_host():
        return targets["process_word"] in text_of(f"/proc/{targets['process']}/cmdline")

    def signal_a_process_of_the_host():
        if targets["process_word"] not in text_of(f"/proc/{targets['process']}/cmdline"):
            return False
        os.kill(targets["process"], 0)
        return True

    def host_namespace_by_setns():
        return libc.setns(os.open(f"/proc/{targets['process']}/ns/mnt", os.O_RDONLY), 0) == 0

    def become_root():
        os.setuid(0)
        return True

    def change_groups():
        os.setgroups([0])
        return True

    def a_program_that_changes_its_user():
        for top in ("/usr", "/bin", "/sbin", "/opt"):
            for folder, _, names in os.walk(top):
                for name in names:
                    info = os.lstat(f"{folder}/{name}")
                    if stat.S_ISREG(info.st_mode) and info.st_mode & 0o6000 and info.st_uid == 0:
                        return True
        return False

    def mount_memory():
        return libc.mount(b"none", b"/mnt" if os.path.isdir("/mnt") else b"/tmp", b"tmpfs", 0, None) == 0

    def make_the_root_writable():
        return libc.mount(None, b"/", None, 32 | 4096, None) == 0

    def write_to_the_root():
        with open("/usr/bin/attack", "w") as stream:
            stream.write("x")
        os.unlink("/usr/bin/attack")
        return True

    def a_namespace_of_users():
        return libc.unshare(0x10000000) == 0

    def a_namespace_of_mounts():
        return libc.unshare(0x00020000) == 0

    def raise_the_memory_bound():
        for path in ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"):
            if os.path.exists(path):
                same = text_of(path)
                with open(path, "w") as stream:
                    stream.write(same)
                return True
        return False

    def make_a_group_of_ones_own():
        for top in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
            if os.path.isdir(top):
                os.mkdir(f"{top}/attack")
                os.rmdir(f"{top}/attack")
                return True
        return False

    def where_the_kernel_dumps_cores():
        same = text_of("/proc/sys/kernel/core_pattern")
        with open("/proc/sys/kernel/core_pattern", "w") as stream:
            stream.write(same)
        return True

    def the_magic_key():
        os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY))
        return True

    def make_a_device():
        os.mknod("/tmp/attack-device", stat.S_IFBLK | 0o600, os.makedev(*targets["disk"]))
        os.unlink("/tmp/attack-device")
        return True

    def memory_of_the_machine():
        os.close(os.open("/dev/mem", os.O_RDONLY))
        return True

    def disk_of_the_machine():
        for name in sorted(os.listdir("/dev")):
            info = os.stat(f"/dev/{name}")
            if stat.S_ISBLK(info.st_mode):
                os.close(os.open(f"/dev/{name}", os.O_RDONLY))
                return True
        return False

    def messages_of_the_kernel():
        os.close(os.open("/dev/kmsg", os.O_RDONLY))
        return True

    def load_a_module():
        return syscall(175, None, 0, None)

    def load_a_program_into_the_kernel():
        return syscall(321, 0, None, 0)

    def keys_of_the_kernel():
        return syscall(250, 0, -4, 1)

    def open_a_file_by_its_handle():
        return syscall(304, -1, None, 0)

    def restart_the_machine():
        return syscall(169, 0, 0, 0, None)  # with a wrong magic number: who may is told EINVAL

    def set_the_hosts_name():
        name = socket.gethostname().encode()
        return libc.sethostname(name, len(name)) == 0

    def real_time_priority():
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        return True

    def raise_a_hard_limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard + (1 << 20)))
        return True

    def more_processes_than_the_bound():
        made = []
        try:
            for _ in range(targets["pids"] + 100):
                pid = os.fork()
                if pid == 0:
                    import time

                    time.sleep(20)
                    os._exit(0)
                made.append(pid)
        except OSError:
            pass
        for pid in made:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        return len(made) > targets["pids"]

    def fill_the_memory_files():
        total = 0
        for place in ("/tmp", "/dev/shm", "/run", "/var/tmp"):
            path = f"{place}/attack-fill"
            try:
                with open(path, "wb") as stream:
                    for _ in range(targets["memory"] * 2 // (1 << 20)):
                        stream.write(b"\0" * (1 << 20))
                        total = max(total, stream.tell())
            except OSError:
                pass
            if os.path.exists(path):
                os.unlink(path)
        return total > targets["memory"]

    return {name: call for name, call in locals().items() if callable(call) and name not in _HELPERS}


_HELPERS = ("libc", "connects", "engine_at", "syscall", "text_of")


_EACH_APART = """
import os
for name, attempt in _attempts().items():
    pid = os.fork()  # what one attempt changes of itself is not the next one's
    if pid == 0:
        try:
            escaped, why = bool(attempt()), ""
        except BaseException as error:
            escaped, why = False, type(error).__name__ + ": " + str(error)
        print(json.dumps({"name": name, "escaped": escaped, "why": why}), flush=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        print(json.dumps({"name": name, "escaped": False, "why": "ended with wait status " + str(status)}), flush=True)
"""


def program() -> str:
    """Return the program that makes all attempts."""
    lines = ["import json, sys", f"_HELPERS = {_HELPERS!r} + ('ctypes', 'os', 'resource', 'socket', 'stat')", "Any = object"]
    lines += [inspect.getsource(_attempts), _EACH_APART]
    return "\n".join(lines)


def outcomes(output: str) -> dict[str, Mapping[str, Any]]:
    """Return name -> outcome from what the program printed."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]
    return {entry["name"]: entry for entry in found}


if __name__ == "__main__":
    sys.stdout.write(program())
