"""The training store: one folder that all workers share, and the truth about rounds.

    store/
      events/<key>.json            invocations, one effect per key
      plans/0000.json              one per generation: workers, shards, seed
      weights/00000012             weights after 12 rounds        } the last two rounds are kept
      gradients/00000012/0003      gradient of shard 3, round 12  }
      rounds/00000012.json         what round 12 was: loss, accuracy, seconds, by whom
      claims/…                     who combines; fences/… newest grant of each worker
      starts/…                     start-up seconds of each slot
      result, failure.json         the end, at most one of each
      quarantine/…                 files that were not what was written

Each file appears whole and once (create-exclusive); two who publish the same name have one effect. A writer whose fence
is older than one seen for its worker is refused. The weights of a round are published last: they are its commit.
Gradients and weights are not forced to disk: what a power cut tears is found by its checksum and computed again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenure.errors import CorruptData, StaleFence
from tenure.train.files import Files
from tenure.train.records import Arrays, Header, pack, read_arrays, read_header

KEEP_ROUNDS = 2


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
        for name in ("events", "plans", "weights", "gradients", "rounds", "claims", "fences", "starts", "quarantine"):
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
        """Return a document's data, or None when there is none. Raises CorruptData."""
        return read_document(self.root / name)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def publish_arrays(self, name: str, arrays: Arrays, meta: Mapping[str, Any], *, durable: bool = False) -> bool:
        """Publish a record; False when the name is taken."""
        return self._publish(name, pack(arrays, fence=self.fence, meta=meta), durable=durable)

    def read(self, name: str) -> tuple[Header, Arrays]:
        """Return a verified record. A torn or rotten one is moved to quarantine first, then CorruptData is raised.

        Raises FileNotFoundError when there is none.
        """
        try:
            return read_arrays(self.root / name)
        except CorruptData:
            self.quarantine(name)
            raise

    def quarantine(self, name: str) -> None:
        """Move a file out of the way, so that its content can be published again."""
        flat = name.replace("/", "-")
        taken = len(self.files.names(self.root / "quarantine"))
        self.files.move(self.root / name, self.root / "quarantine" / f"{flat}.{taken}")

    # --- rounds -------------------------------------------------------------------------------------------------------

    def latest_round(self) -> int:
        """Return how many rounds are finished; -1 when the first weights are not there yet."""
        names = self.files.names(self.root / "weights")
        return int(names[-1]) if names else -1

    def shards_there(self, round_: int) -> set[int]:
        """Return the shards of a round whose gradients are published."""
        return {int(name) for name in self.files.names(self.root / "gradients" / f"{round_:08d}")}

    def open_round(self, round_: int) -> None:
        """Make the folder of a round's gradients."""
        self.files.make_folder(self.root / "gradients" / f"{round_:08d}")

    def forget_before(self, round_: int) -> None:
        """Remove weights, gradients and combine claims that no step from `round_` on can need."""
        oldest = round_ - KEEP_ROUNDS + 1
        for name in self.files.names(self.root / "weights", hidden=True):
            if int(name.lstrip(".").split(".")[0]) < oldest:  # unfinished ones of killed writers too
                self.files.remove(self.root / "weights" / name)
        for name in self.files.names(self.root / "gradients"):
            if int(name) < oldest:
                self.files.remove_folder(self.root / "gradients" / name)
        for name in self.files.names(self.root / "claims"):
            if name.startswith("combine-") and int(name.split("-")[1].split(".")[0]) < oldest:
                self.files.remove(self.root / "claims" / name)

    def latest_generation(self) -> int:
        """Return the newest start of this stage, -1 before the first."""
        names = self.files.names(self.root / "plans")
        return int(names[-1].split(".")[0]) if names else -1

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _publish(self, name: str, pieces: list[Any], *, durable: bool) -> bool:
        self._check_fence()
        path = self.root / name
        created = not self.files.exists(path) and self.files.publish(path, pieces, durable=durable)
        if not created and not name.startswith("claims/"):
            self.double_starts += 1
        return created

    def _check_fence(self) -> None:
        mine = f"{self.worker:04d}-"
        names = [name for name in self.files.names(self.root / "fences") if name.startswith(mine)]
        newest = max((int(name.split("-")[1]) for name in names), default=0)
        if newest > self.fence:
            raise StaleFence(
                f"worker {self.worker}: this lease has fence {self.fence}, a newer grant with fence {newest} writes to "
                f"{self.root}. This process must end; the newer one goes on."
            )


class Claims:
    """Who does a piece of work that one suffices for.

    A claim is a file ``<name>.<n>``; the highest n holds it. It lapses when an observer has seen the same holder for
    `period_s` by the observer's own clock: no clock is compared with another, so a wrong one does no harm. Taking over is
    creating n + 1, which only one can. A holder that is merely slow then works beside its successor: the store's
    create-exclusive publishing keeps that to one effect.
    """

    def __init__(self, store: Store) -> None:
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
        store = self._store
        numbers = [int(n.rsplit(".", 1)[1]) for n in store.files.names(store.root / "claims") if n.rsplit(".", 1)[0] == name]
        return max(numbers, default=-1)


def read_document(path: Path) -> Any:
    """Return the data of a published JSON document, None when there is none. Raises CorruptData."""
    try:
        body = json.loads(path.read_bytes())
        text = json.dumps(body["data"], sort_keys=True)
        sound = zlib.crc32(text.encode()) == body["crc32"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(f"{path} is not a document of a training store: {error}") from error
    if not sound:
        raise CorruptData(f"{path} does not match its checksum; remove it to have it made again")
    return body["data"]


def read_result(store_dir: Path) -> Header | None:
    """Return the header of the stage's result, or None before it is reached. Its `meta` says why training ended."""
    try:
        return read_header(store_dir / "result")
    except FileNotFoundError:
        return None


def weights_name(rounds: int) -> str:
    """Return the name of the weights after so many rounds."""
    return f"weights/{rounds:08d}"


def gradient_name(round_: int, shard: int) -> str:
    """Return the name of one shard's gradient."""
    return f"gradients/{round_:08d}/{shard:04d}"


def round_name(round_: int) -> str:
    """Return the name of a round's record."""
    return f"rounds/{round_:08d}.json"
