"""The training store: one folder that all workers share, and the truth about rounds.

    store/
      events/<key>.json               invocations, one effect per key
      plans/0000.json                 one per generation: workers, shards, seed
      layout.json                     names, dtypes and shapes of the gradient
      nodes/00000012-0000-0004        gradient of shards 0 to 3, round 12       } the last two rounds are kept
      sums/00000012-0002-0001         slice 1 of 2 of the sum over all shards   } since the older of the checkpoints
      weights/00000012                checkpoint: weights after 12 rounds       } the last two are kept
      rounds/00000012.json            what round 12 was: loss, accuracy, seconds, by whom
      claims/…                        who does what one suffices for; fences/… newest grant of each worker
      starts/…                        start-up seconds of each slot
      local/…, anew/…                 what is a worker's own (`own_state`), and where it began without
      result                          the end; failures/0000.json that of a generation that could not go on
      quarantine/…                    files that were not what was written

Each file appears whole and once (create-exclusive); two who publish the same name have one effect. A writer whose fence
is older than one seen for its worker is refused. The last slice of a round's sum is the round's commit: from then on the
next weights are determined. Only what is needed to begin at all, and the end, is forced to disk: what a power cut tears is
found by its checksum and made again.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tenure.errors import CorruptData, StaleFence
from tenure.train.files import Files
from tenure.train.records import BLOCK_BYTES, Arrays, Header, Record, pack

FOLDERS = (
    *("events", "plans", "weights", "nodes", "sums", "rounds", "claims", "fences", "starts", "local", "anew", "failures"),
    "quarantine",
)
_EXPECTED_TWICE = ("claims", "layout.json", "failures", "local", "anew")
"""What several publish by design: no lost work."""


class Store:
    """One process's door to the store. Not shared between threads.

    worker, fence: whose lease writes. Raises StaleFence when a newer grant of the same worker was here.
    """

    def __init__(self, root: Path, *, worker: int = 0, fence: int = 0, files: Files | None = None) -> None:
        self.root = root
        self.worker = worker
        self.fence = fence
        self.files = files or Files()
        self.double_starts = 0
        """How often this process had done what was published already: work lost, never a second effect."""
        for name in FOLDERS:
            self.files.make_folder(root / name)
        self._check_fence()
        self.files.publish(root / "fences" / f"{worker:04d}-{fence:016d}", [b""], durable=False)

    # --- small documents ----------------------------------------------------------------------------------------------

    def publish_json(self, name: str, data: Any, *, durable: bool = False) -> bool:
        """Publish a JSON document with checksum and fence; False when the name is taken."""
        text = json.dumps(data, sort_keys=True, allow_nan=False)
        body = json.dumps({"crc32": zlib.crc32(text.encode()), "fence": self.fence, "data": data}, sort_keys=True)
        return self._publish(name, [body.encode()], durable=durable)

    def read_json(self, name: str) -> Any:
        """Return a document's data, or None when there is none. Raises CorruptData; the file is in quarantine then."""
        with self.quarantining(name):
            return read_document(self.root / name, self.files)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def publish_arrays(
        self,
        name: str,
        arrays: Arrays,
        meta: Mapping[str, Any],
        *,
        durable: bool = False,
        block_bytes: int = BLOCK_BYTES,
        align: int = 64,
    ) -> bool:
        """Publish a record; False when the name is taken."""
        pieces = pack(arrays, fence=self.fence, meta=meta, block_bytes=block_bytes, align=align)
        return self._publish(name, pieces, durable=durable)

    def record(self, name: str) -> Record:
        """Return a record to be read in parts. Raises FileNotFoundError, CorruptData."""
        return Record(self.root / name, self.files)

    def read(self, name: str) -> tuple[Header, Arrays]:
        """Return a whole record, verified. Raises FileNotFoundError, or CorruptData; the file is in quarantine then."""
        with self.quarantining(name):
            record = self.record(name)
            return record.header, record.arrays()

    @contextlib.contextmanager
    def quarantining(self, name: str) -> Iterator[None]:
        """Move the file out of the way when what is done with it raises CorruptData."""
        try:
            yield
        except CorruptData:
            self.quarantine(name)
            raise

    def quarantine(self, name: str) -> None:
        """Move a file out of the way, so that its content can be published again."""
        flat = name.replace("/", "-")
        taken = len(self.files.names(self.root / "quarantine"))
        self.files.move(self.root / name, self.root / "quarantine" / f"{flat}.{taken}")

    # --- names --------------------------------------------------------------------------------------------------------

    def names(self, folder: str) -> list[str]:
        """Return the finished files of a folder, sorted."""
        return self.files.names(self.root / folder)

    def pairs(self, kind: str, round_: int) -> set[tuple[int, int]]:
        """Return the two numbers in the name of each node (or slice of the sum) of a round. kind: `nodes` or `sums`."""
        start = f"{round_:08d}-"
        return {(int(name[9:13]), int(name[14:])) for name in self.names(kind) if name.startswith(start)}

    def exists(self, name: str) -> bool:
        """Return whether a finished file of this name is there."""
        return self.files.exists(self.root / name)

    def checkpoints(self) -> list[int]:
        """Return after how many rounds weights are kept, ascending."""
        return [int(name) for name in self.names("weights")]

    def newest_sum(self) -> int:
        """Return the newest round of which a part of the sum was published; -1 before the first."""
        return self._newest("sums")

    def newest_node(self) -> int:
        """Return the newest round of which a gradient was published; -1 before the first."""
        return self._newest("nodes")

    def summed_rounds(self) -> list[int]:
        """Return the rounds of whose sums anything is there, ascending."""
        return sorted({int(name[:8]) for name in self.names("sums")})

    def latest_generation(self) -> int:
        """Return the newest start of this stage, -1 before the first."""
        names = self.names("plans")
        return int(names[-1].split(".")[0]) if names else -1

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when it is gone."""
        self.files.remove(self.root / name)

    def forget(self, *, nodes_before: int, sums_before: int, weights_before: int) -> None:
        """Remove nodes, sums and checkpoints of earlier rounds, the claims on them, and what killed writers left of them."""
        for folder, oldest in (("nodes", nodes_before), ("sums", sums_before), ("weights", weights_before)):
            for name in self.files.names(self.root / folder, hidden=True):
                if int(name.lstrip(".")[:8]) < oldest:
                    self.files.remove(self.root / folder / name)
        for name in self.names("claims"):
            if int(name.split("-")[1].split(".")[0]) < nodes_before:
                self.files.remove(self.root / "claims" / name)

    # --- beginning again ----------------------------------------------------------------------------------------------

    def begin_again(self, generation: int, *, changed: bool) -> None:
        """Drop what the round under way has that no longer fits, before a generation publishes its plan.

        That is the sum of a round that failed the generation before with its nodes, and, when program or data `changed`, the
        nodes of a round without a sum. Nobody else works then; should this process have been slow, and the plan be there, it
        leaves at once. Failures are told by generation, so that nothing is in the way of the next one.
        """
        failed = max((int(name[:4]) for name in self.names("plans") if int(name[:4]) < generation), default=0)
        failure = self.read_json(failure_name(failed))
        if failure is None and not changed:
            return
        first = self.newest_sum() + 1 if failure is None else int(failure["round"])
        for kind in ("nodes", "sums"):
            for name in self.names(kind):
                if int(name[:8]) >= first and self.latest_generation() < generation:
                    self.files.remove(self.root / kind / name)

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _newest(self, kind: str) -> int:
        names = self.names(kind)
        return int(names[-1][:8]) if names else -1

    def _publish(self, name: str, pieces: list[Any], *, durable: bool) -> bool:
        self._check_fence()
        path = self.root / name
        created = not self.files.exists(path) and self.files.publish(path, pieces, durable=durable)
        if not created and name.split("/")[0] not in _EXPECTED_TWICE:
            self.double_starts += 1
        return created

    def _check_fence(self) -> None:
        mine = f"{self.worker:04d}-"
        newest = max((int(name.split("-")[1]) for name in self.names("fences") if name.startswith(mine)), default=0)
        if newest > self.fence:
            raise StaleFence(
                f"worker {self.worker}: this lease has fence {self.fence}, a newer grant with fence {newest} writes to "
                f"{self.root}. This process must end; the newer one goes on."
            )


class Documents(Protocol):
    """Small documents in folders that several processes share, as `Claims` needs them."""

    def publish_json(self, name: str, data: Any) -> bool:
        """Publish a document; False when the name is taken."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the finished files of a folder, sorted."""
        ...


class Claims:
    """Who does a piece of work that one suffices for.

    A claim is a file ``<name>.<n>``; the highest n holds it. It lapses when an observer has seen the same holder for
    `period_s` by the observer's own clock: no clock is compared with another, so a wrong one does no harm. Taking over is
    creating n + 1, which only one can. A holder that is merely slow then works beside its successor: the store's
    create-exclusive publishing keeps that to one effect.
    """

    def __init__(self, store: Documents) -> None:
        self._store = store
        self._seen: dict[str, tuple[int, float]] = {}

    def claim(self, name: str, owner: str, *, now_s: float, period_s: float) -> bool:
        """Return whether `owner` may do the work now. Ask again while it is not done.

        now_s: any monotonic clock of this process. period_s: after so long without result a claim is taken over.
        """
        number = self._holder(name)
        first, since = self._seen.setdefault(name, (number, now_s))
        if number >= 0 and (first != number or now_s - since < period_s):
            if first != number:
                self._seen[name] = (number, now_s)
            return False
        won = self._store.publish_json(f"claims/{name}.{number + 1:04d}", {"owner": owner})
        self._seen[name] = (number + 1, now_s)
        return won

    def takeovers(self, name: str) -> int:
        """Return how often the claim changed hands."""
        return max(0, self._holder(name))

    def _holder(self, name: str) -> int:
        numbers = [int(n.rsplit(".", 1)[1]) for n in self._store.names("claims") if n.rsplit(".", 1)[0] == name]
        return max(numbers, default=-1)


def read_document(path: Path, files: Files | None = None) -> Any:
    """Return the data of a published JSON document, None when there is none. Raises CorruptData."""
    try:
        body = json.loads(bytes((files or Files()).read(path)))
        text = json.dumps(body["data"], sort_keys=True)
        sound = zlib.crc32(text.encode()) == body["crc32"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{path} is not a document of a training store: {error}") from error
    if not sound:
        raise CorruptData(f"{path} does not match its checksum; remove it to have it made again")
    return body["data"]


def read_result(store_dir: Path, files: Files | None = None) -> Header | None:
    """Return the header of the stage's result, or None before it is reached. Its `meta` says why training ended."""
    try:
        return Record(store_dir / "result", files).header
    except FileNotFoundError:
        return None


def failure_name(generation: int) -> str:
    """Return the name of what a generation could not go on for."""
    return f"failures/{generation:04d}.json"


def weights_name(rounds: int) -> str:
    """Return the name of the weights after so many rounds."""
    return f"weights/{rounds:08d}"


def node_name(round_: int, node: tuple[int, int]) -> str:
    """Return the name of the gradient of shards node[0] to node[1] - 1."""
    return f"nodes/{round_:08d}-{node[0]:04d}-{node[1]:04d}"


def sum_name(round_: int, slices: int, number: int) -> str:
    """Return the name of a slice of a round's sum."""
    return f"sums/{round_:08d}-{slices:04d}-{number:04d}"


def round_name(rounds: int) -> str:
    """Return the name of the record of the round that finished as the `rounds`-th."""
    return f"rounds/{rounds:08d}.json"
