"""Whether and how a request's inputs travel by shared memory: the rules around `regions`, over the HTTP door for control.

By itself: the server's address is this machine's, it offers system_shared_memory, the inputs are large enough to pay, and
it could open what was made for it. The first "no" turns it off for this client (a server in another container sees
another /dev/shm); requests then travel in the body. A region that the server has forgotten, because it was started anew
or told to, is made again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from tenure.errors import TenureError, Unavailable
from tenure.serve.http_client import v2json
from tenure.serve.http_client.blocking import Answered, Buffer
from tenure.serve.http_client.regions import Part, Region, Regions, offsets
from tenure.serve.tensors import Array

PAYS_FROM_BYTES = 128 << 10
"""Inputs from this size on go by shared memory. Measured on loopback with a server that only answers: alike at 64 KiB, 1.4
times as many requests at 128 KiB, twice as many at 600 KB."""
_CONTROL_TIMEOUT_S = 5.0
"""Of asking for and about regions, or the client's own timeout if that is shorter."""
_NOT_NOW = (429, 503)
_EXTENSION = "system_shared_memory"
_PATH = "/v2/systemsharedmemory"

Ask = Callable[[Sequence[Buffer], float], Answered]


class SharedInputs:
    """One client's shared memory with one server. Used by its threads, and by its event loop's."""

    def __init__(self, address: str, ask: Ask, *, insist: bool, off: bool) -> None:
        self._address, self._ask, self._insist = address, ask, insist
        self._regions = Regions()
        self._off = off
        self._offered = False

    def fits(self, inputs: Mapping[str, Array]) -> bool:
        """Return whether these inputs should go by shared memory. BYTES never do: they are no arrays to copy in place."""
        if self._off:
            return False
        nbytes = 0
        for array in inputs.values():
            if array.dtype.kind in "OSU":
                return False
            nbytes += array.nbytes
        return nbytes >= PAYS_FROM_BYTES or (self._insist and nbytes > 0)

    def take_nowait(self, inputs: Mapping[str, Array]) -> Part | None:
        """Return a part that exists and is free, or None; asks nobody."""
        try:
            return self._regions.take(offsets(inputs)[1], None)
        except OSError:
            return None

    def take(self, inputs: Mapping[str, Array]) -> Part | None:
        """Return room for these inputs, registered with the server; None: let them travel in the body.

        Raises Unavailable when shared memory was insisted on and can't be had, or when nobody answers; Overloaded.
        """
        try:
            if not self._offered:
                self._offered = self._is_offered()
            return self._regions.take(offsets(inputs)[1], self._register)
        except (_Refused, OSError) as error:
            if self._insist:
                raise Unavailable(
                    f"no shared memory with http://{self._address}: {error}. Leave it to Tenure: shm=None"
                ) from error
            self._off = True
            return None

    def give(self, part: Part) -> None:
        """Make a part free again."""
        self._regions.give(part)

    def request(self, part: Part, key: v2json.Key, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> bytes:
        """Copy the inputs to their places, the one copy they see, and return the request that names these."""
        known = part.heads.get(key)
        if known is None:
            starts, _ = offsets(inputs)
            where = [
                (part.region.name, part.offset + start, array.nbytes)
                for start, array in zip(starts, inputs.values(), strict=True)
            ]
            content = v2json.infer_head(self._address, name, inputs, [], outputs, where)
            known = (content, [part.place(start, array) for start, array in zip(starts, inputs.values(), strict=True)])
            part.remember(key, *known)
        for array, place in zip(inputs.values(), known[1], strict=True):
            np.copyto(place, array)
        return known[0]

    def was_lost(self, part: Part, status: int) -> bool:
        """Return whether a request failed because the server does not know the part's region any more; asks it.

        status: HTTP status of the answer.
        """
        if status not in (400, 404):
            return False
        head, *_ = self._ask([v2json.get_head(self._address, f"{_PATH}/region/{part.region.name}/status")], _CONTROL_TIMEOUT_S)
        if head.status == 200:
            return False
        self._regions.lose(part.region)
        return True

    def close(self) -> None:
        """Give all memory back, the server's hold on it too as far as it still answers."""
        self._off = True
        for name in self._regions.close():
            try:
                self._post(f"{_PATH}/region/{name}/unregister", {})
            except (TenureError, _Refused):
                return

    def _is_offered(self) -> bool:
        head, body, *_ = self._ask([v2json.get_head(self._address, "/v2")], _CONTROL_TIMEOUT_S)
        if head.status != 200 or _EXTENSION not in v2json.read_extensions(body):
            raise _Refused(f"the server does not offer {_EXTENSION}")
        return True

    def _register(self, region: Region) -> None:
        self._post(
            f"{_PATH}/region/{region.name}/register", {"key": f"/{region.name}", "offset": 0, "byte_size": region.nbytes}
        )

    def _post(self, path: str, content: Mapping[str, object]) -> None:
        body = msgspec.json.encode(content)
        head = v2json.post_head(self._address, path, len(body), "Content-Type: application/json")
        found, said, *_ = self._ask([head, body], _CONTROL_TIMEOUT_S)
        if found.status in _NOT_NOW:
            raise v2json.told_error(found, said)
        if found.status != 200:
            raise _Refused(str(v2json.told_error(found, said)))


class _Refused(Exception):
    """The server said no: asking again is useless."""


def here(host: str) -> bool:
    """Return whether an address is this machine's own by its looks; a name other than localhost is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
