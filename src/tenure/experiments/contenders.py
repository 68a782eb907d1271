"""Servers of others that already run, to be measured in the same table: found by their address, asked what they are.

    grpc://host:8001 ──ServerMetadata──► "triton" ──ModelMetadata──► takes what our model takes? ──► Contender
                     └── on this machine: who listens there, and all it started, is what the meter watches

Any server of the Open Inference Protocol v2: Triton, MLServer, KServe, another of ours. Nothing of it is started, leased or
ended here. Not here: running its cells (`sweep_nodes`), how it did (`bench_report`).
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.experiments.sweep import OURS, Contender
from tenure.meter.process import children
from tenure.serve.client import Model
from tenure.serve.tensors import DTYPES, ModelMetadata, TensorMetadata

ASK_S = 5.0
"""Bound of each question."""
PORTS = {"http": 8000, "grpc": 8001}
"""Where a server listens when its address names no port: Triton's."""
_LISTENING = "0A"
"""TCP_LISTEN in /proc/net/tcp."""
_OTHER_THAN_NAMES = re.compile(r"[^a-z0-9._-]+")
_PROXIES = frozenset({"docker-proxy", "rootlessport", "slirp4netns", "pasta"})
"""Programs that listen in place of a container's server, and are not it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """An address as the user wrote it: ``grpc://host:port?model=NAME&pid=N&name=LABEL``, the last three optional."""

    transport: str
    host: str
    port: int
    model: str = ""
    """Its name there; empty: that of our model."""
    pid: int = 0
    """The server's first process on this machine; 0: whoever listens at the port."""
    name: str = ""
    """In tables; empty: what the server says of itself."""

    @property
    def target(self) -> str:
        """As clients take it."""
        return f"{self.transport}://{self.address}"

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_against(text: str) -> Against:
    """Return the address of a contender. Raises SpecError."""
    parts = urlsplit(text if "://" in text else f"grpc://{text}")
    try:
        port, given = parts.port, dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        pid = int(given.pop("pid", 0))
    except ValueError as error:
        raise SpecError(f"{text!r} is no address of a server: {error}") from error
    names = {key: given.pop(key, "") for key in ("model", "name")}
    if parts.scheme not in PORTS or not parts.hostname or parts.path not in ("", "/") or given or pid < 0:
        found = f"; it has no {sorted(given)[0]!r}" if given else ""
        raise SpecError(
            f"a contender is http:// or grpc://HOST:PORT, with ?model=, pid= and name= if need be; found {text!r}{found}"
        )
    if names["name"] and (names["name"] == OURS or _OTHER_THAN_NAMES.search(names["name"])):
        raise SpecError(f"name={names['name']}: a contender's name is of a-z, 0-9, '.', '_' and '-', and not {OURS!r}")
    return Against(transport=parts.scheme, host=parts.hostname, port=port or PORTS[parts.scheme], pid=pid, **names)


def find_contenders(
    addresses: Iterable[str], model: str, ours: ModelMetadata, *, largest_batch: int = 1, warn: Callable[[str], None]
) -> tuple[Contender, ...]:
    """Return the servers at these addresses, HTTP and gRPC of one server as one contender.

    model: its name there unless an address says another. ours: what the model takes here: theirs must take the same.
    warn: told what cannot be known of one. Raises SpecError, Unavailable, NotFound, each with what to do.
    """
    found: dict[str, Contender] = {}
    for text in addresses:
        against = parse_against(text)
        said = _name_of(against)
        _check_model(against, against.model or model, ours, largest_batch, warn)
        one = Contender(
            name=against.name or said,
            targets={against.transport: against.target},
            model=against.model or model,
            pids=_processes(against, warn),
            link="loopback" if is_here(against.host) else "network",
        )
        twin = found.get(one.name)
        if twin is not None and (against.transport in twin.targets or twin.model != one.model or twin.link != one.link):
            one = replace(one, name=f"{one.name}-{against.port}")
            twin = found.get(one.name)
        if twin is not None:
            pids = tuple(dict.fromkeys((*twin.pids, *one.pids)))
            one = replace(one, targets={**twin.targets, **one.targets}, pids=pids)
        found[one.name] = one
    return tuple(found.values())


def is_here(host: str) -> bool:
    """Whether a host is this machine: one can only bind to addresses of one's own. Raises Unavailable for an unknown name."""
    for address in _addresses(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, 0))
            return True
    return False


def listeners(port: int, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """Return the processes that listen at a TCP port of this machine, as far as they may be looked at; any order."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (proc / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    return tuple(pid for pid in _pids(proc) if inodes & set(_open_files(proc, pid))) if inodes else ()


def tree(pids: Iterable[int]) -> tuple[int, ...]:
    """Return processes with all that they started, each once."""
    found: dict[int, None] = {}
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found[pid] = None
            waiting += children(pid)
    return tuple(sorted(found))


def _processes(against: Against, warn: Callable[[str], None]) -> tuple[int, ...]:
    """Return what the meter watches; nothing, and the reason told, where that cannot be known."""
    where = against.target
    if not against.pid and not is_here(against.host):
        warn(f"{where} is not on this machine: its CPU and memory are not measured")
        return ()
    first = (against.pid,) if against.pid else listeners(against.port)
    proxies = [pid for pid in first if _comm(pid) in _PROXIES]
    if not first or proxies:
        why = f"{_comm(proxies[0])} listens there for a container" if proxies else "who listens there may not be looked at"
        warn(f"{where}: {why}; its CPU and memory are not measured unless you say ?pid=N, the server's first process")
        return ()
    if against.pid and not _comm(against.pid):
        raise SpecError(f"{where}: pid={against.pid} is no process of this machine")
    return tree(first)


def _name_of(against: Against) -> str:
    """Return what a server calls itself, as a name of ours can be. Raises Unavailable."""
    try:
        said = _ask_http(against, "/v2") if against.transport == "http" else _ask_grpc(against, "ServerMetadata")
    except Unavailable:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(
            f"no server of the Open Inference Protocol v2 answers at {against.target} ({error}). Start it first, and name the "
            "port of that protocol"
        ) from error
    name = _OTHER_THAN_NAMES.sub("-", str(said.get("name", "")).lower()).strip("-.") or "other"
    return f"{name}-{against.port}" if name == OURS else name


def _check_model(against: Against, model: str, ours: ModelMetadata, largest_batch: int, warn: Callable[[str], None]) -> None:
    """Raise NotFound without the model there, SpecError when it takes something else or smaller batches."""
    try:
        with Model(against.target, model, timeout_s=ASK_S, **({"shm": False} if against.transport == "http" else {})) as there:
            theirs = there.metadata()
            if not theirs.inputs:
                warn(f"{against.target} does not say what model {model!r} takes: it is asked as the model here is")
            elif not _alike(ours.inputs, theirs.inputs):
                raise SpecError(
                    f"{against.target}: model {model!r} takes {_shapes(theirs.inputs)}, and the model here "
                    f"{_shapes(ours.inputs)}: only the same model can be compared"
                )
            _try(there, against, theirs.inputs or ours.inputs)
    except NotFound as error:
        raise NotFound(
            f"{against.target} has no model {model!r}: say its name there, as in {against.target}?model=NAME"
        ) from error
    most = _most_rows(against, model)
    if 0 < most < largest_batch:
        raise SpecError(
            f"{against.target}: model {model!r} takes batches up to {most}, and {largest_batch} is asked: leave out larger "
            "ones with --batches, or raise max_batch_size there"
        )


def _try(there: Model, against: Against, inputs: Sequence[TensorMetadata]) -> None:
    """Ask for one row of zeros. Raises SpecError where a request as ours has no answer: some servers do not read all forms."""
    row = {
        one.name: np.zeros([length if length > 0 else 1 for length in one.shape], DTYPES[one.datatype])
        for one in inputs
        if one.datatype in DTYPES and one.datatype != "BYTES"
    }
    try:
        there.predict_timed(row)
    except TenureError as error:
        other = "grpc" if against.transport == "http" else "http"
        raise SpecError(
            f"{against.target} answers a request with binary tensors by: {error}. Leave it out, or name its {other} address"
        ) from error


def _alike(ours: Sequence[TensorMetadata], theirs: Sequence[TensorMetadata]) -> bool:
    """Whether requests made for one fit the other, names apart. Any length fits a given one."""
    if len(ours) != len(theirs):
        return False
    return all(
        one.datatype == two.datatype
        and len(one.shape) == len(two.shape)
        and all(have in (want, -1) or want == -1 for want, have in zip(one.shape[1:], two.shape[1:], strict=True))
        and two.shape[:1] in (one.shape[:1], (-1,))
        for one, two in zip(ours, theirs, strict=True)
    )


def _shapes(tensors: Sequence[TensorMetadata]) -> str:
    return ", ".join(f"{one.name} {one.datatype} {list(one.shape)}" for one in tensors)


def _most_rows(against: Against, model: str) -> int:
    """Return the largest batch that a server says it takes; 0 where it doesn't say, or knows no batches."""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, TenureError, TypeError):
        if against.transport == "http":
            config = _ask_http(against, f"/v2/models/{model}/config")
        else:
            config = _ask_grpc(against, "ModelConfig", name=model).get("config", {})
        return int(config.get("max_batch_size", 0))
    return 0


def _ask_http(against: Against, path: str) -> dict[str, Any]:
    client = http.client.HTTPConnection(against.host, against.port, timeout=ASK_S)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        content = answer.read(1 << 20)
        if answer.status != 200:
            raise ValueError(f"{path} answers {answer.status}")
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"{path} answers {content[:80]!r}")
        return found
    finally:
        client.close()


def _ask_grpc(against: Against, method: str, **fields: str) -> dict[str, Any]:
    import grpc  # heavy, and only where such an address is given
    from google.protobuf import json_format

    from tenure.serve import v2

    asked, answered = v2.METHODS[method]
    with grpc.insecure_channel(against.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(f"/{v2.SERVICE}/{method}", asked.SerializeToString, answered.FromString)
        try:
            found: dict[str, Any] = json_format.MessageToDict(
                call(asked(**fields), timeout=ASK_S), preserving_proto_field_name=True
            )
        except grpc.RpcError as error:
            raise ValueError(f"{method}: {error.code().name.lower()}") from error
    return found


def _addresses(host: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    try:
        return sorted({str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise Unavailable(f"the name {host!r} is not known here: {error}") from error


def _pids(proc: Path) -> Iterator[int]:
    yield from (int(entry) for entry in os.listdir(proc) if entry.isdecimal())


def _open_files(proc: Path, pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for each in os.listdir(proc / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(proc / str(pid) / "fd" / each)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
