"""What the server and an instance's process say to each other: one message per batch in each direction, no I/O here.

    server ── Run, MapRegion, DropRegion ──► instance        one sequenced-packet socket, messages in order
    server ◄── Loaded | NotLoaded, then Done ── instance      tensors never travel: they lie in shared memory

A call is described by its place in the arena and by a *layout*: its tensors relative to that place, encoded once for
all requests of the same form. An instance remembers what it decoded, by the layout's bytes.
"""

from __future__ import annotations

import msgspec

MAX_MESSAGE_BYTES = 192 << 10
"""Both ways; below what a socket of this kind takes with the system's default buffers."""
SLOTS = 2
"""Answer memories of an instance: one batch's answers are read while the next one's are written."""

OK, REFUSED, FAILED, AGAIN = range(4)
"""How a call of a batch ended. AGAIN: not run to its end, because its company's answers filled the memory: run it alone."""


class Input(msgspec.Struct, array_like=True, frozen=True):
    """Where an input lies: in a region, or (0) in the arena from the call's buffer on."""

    region: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]


class Target(msgspec.Struct, array_like=True, frozen=True):
    """An output asked for, by its place in the model's signature, and the region it goes to (0: into the answer)."""

    output: int
    region: int
    offset: int
    nbytes: int


class Layout(msgspec.Struct, array_like=True, frozen=True):
    """The form of a call: inputs in the model's order, outputs in the order asked for (none: all)."""

    rows: int
    inputs: tuple[Input, ...]
    targets: tuple[Target, ...] = ()


class Run(msgspec.Struct, array_like=True, tag=0):
    """Run calls: stacked as one batch, or one after the other."""

    number: int
    slot: int
    stacked: bool
    offsets: list[int]
    layouts: list[bytes]


class MapRegion(msgspec.Struct, array_like=True, tag=1):
    """Map a shared-memory object; its descriptor comes with the message."""

    region: int
    offset: int
    nbytes: int
    writable: bool


class DropRegion(msgspec.Struct, array_like=True, tag=2):
    """Forget a region."""

    region: int


class Tensor(msgspec.Struct, array_like=True):
    """A tensor of a signature."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Loaded(msgspec.Struct, array_like=True, tag=0):
    """The model is ready."""

    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    stackable: bool
    pays: bool
    """Both as `warmup.Warmth` says."""


class NotLoaded(msgspec.Struct, array_like=True, tag=1):
    """The model cannot be loaded."""

    kind: str
    text: str
    details: list[str] = []
    """MissingExtra: package, extra, what for."""


class Rows(msgspec.Struct, array_like=True):
    """An output of a stacked run: all calls' rows behind each other."""

    output: int
    shape: tuple[int, ...]
    """Past the first dimension."""
    offset: int
    row_bytes: int


class Found(msgspec.Struct, array_like=True):
    """An output of one call. offset: in the answer memory, or in the region."""

    output: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Ended(msgspec.Struct, array_like=True):
    """How one call ended that is not part of `Rows`."""

    code: int
    text: str = ""
    outputs: list[Found] = []


class Done(msgspec.Struct, array_like=True, tag=2):
    """A batch has ended. Either `rows` (a stacked run that went well) or one `ended` per call."""

    number: int
    runs: int
    """How often the engine ran."""
    input_s: float
    infer_s: float
    output_s: float
    rows: list[Rows]
    ended: list[Ended]
    stackable: bool = True
    """False: an output did not have a row for each row, so this model's calls must not be stacked."""


encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Run | MapRegion | DropRegion).decode
decode_report = msgspec.msgpack.Decoder(Loaded | NotLoaded | Done).decode
decode_layout = msgspec.msgpack.Decoder(Layout).decode
