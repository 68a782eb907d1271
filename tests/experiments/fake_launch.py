"""A `protocols.Launch` that runs plain subprocesses: no lease, no bounds, the same files and environment."""

import contextlib
import json
import os
import signal
import subprocess
import time

import psutil

from tenure.errors import JobFailed
from tenure.protocols import Exit, ExitKind
from tenure.usage import Usage


class PlainLaunch:
    """Starts each request at once; `stop_all` ends what is left."""

    def __init__(self, root):
        self.root, self.started, self.requests = root, [], []

    def __call__(self, request):
        self.requests.append(request)
        launched = PlainLaunched(self.root / f"{len(self.started)}-{request.name}", request, f"l-{len(self.started)}")
        self.started.append(launched)
        launched.wait_listening()
        return launched

    def stop_all(self):
        for launched in self.started:
            launched.stop()


class PlainLaunched:
    def __init__(self, folder, request, lease_id):
        folder.mkdir(parents=True)
        self.worker_dir, self.lease_id, self._request = folder, lease_id, request
        environment = {**os.environ, "TENURE_WORKER_DIR": str(folder), "OMP_NUM_THREADS": "1", "TENURE_LEASE_ID": lease_id}
        kind, _, name = request.command.network.partition(":")
        argv = (*(("ip", "netns", "exec", name) if kind == "netns" else ()), *request.command.argv)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._last = Usage(at_s=time.time())

    @property
    def endpoints(self):
        try:
            return json.loads((self.worker_dir / "endpoints.json").read_text())
        except FileNotFoundError:
            return {}

    def wait_listening(self):
        end_s = time.monotonic() + 30
        while set(self._request.command.ports) - set(self.endpoints):
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise JobFailed(f"it does not listen: {self._log.read_text()}")
            time.sleep(0.02)

    def usage(self):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            cpu, memory = process.cpu_times(), process.memory_info()
            anonymous = memory.rss
            self._last = Usage(
                at_s=time.time(),
                cpu_s=cpu.user + cpu.system,
                memory_bytes=anonymous,
                peak_memory_bytes=max(anonymous, self._last.peak_memory_bytes),
            )
        return self._last

    def wait(self, timeout_s):
        try:
            code = self._process.wait(timeout_s or 0.001)
        except subprocess.TimeoutExpired:
            return None
        tail = self._log.read_text()[-2000:]
        return Exit(kind=ExitKind.COMPLETED if code == 0 else ExitKind.FAILED, code=max(0, code), log_tail=tail)

    def kill(self):
        """End its whole process group at once, as a lease's end does."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, grace_s=5.0):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(5)
        return self.wait(0.0)
