"""Hostile values, and mutation of JSON trees and of bytes. Everything is drawn from a `random.Random` that is handed in."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

INTEGERS = (-1, 0, 1, 2, 15, 17, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**15, -(10**15), 10**30)
TEXTS = (
    "",
    "\x00",
    "x" * 3000,
    "../../../etc/passwd",
    "\U0001f600",
    "\ud800",
    "%s%n%00",
    "fp32",
    "BYTES",
    "BF16",
    "FP128",
    "-0",
)
SHAPES: tuple[Any, ...] = (
    *([], [0], [-1], [1] * 300, [2**31, 2**33], [2**62, 4], [2**63, 0], [0, 16], [1, 16, 1], [16, 1]),
    *([1, "16"], "16", None, [1.0, 16], [[1, 16]], [True, 16], {"0": 1}, [1e308, 1], [10**15, 16], [-1, 16]),
)
DATA: tuple[Any, ...] = (
    *(
        [],
        [[]],
        [None],
        ["a"],
        [1e400],
        [float("nan")] * 16,
        [10**40] * 16,
        [[1] * 16, [2] * 15],
        {"a": 1},
        "AAAA",
        [True] * 16,
    ),
    *([[[[[[[[[[[[1]]]]]]]]]]]], list(range(17)), list(range(15)), [1e-310] * 16, [-(2**63)] * 16),
)
TEXT_TRICKS = (
    *(b"[" * 20_000, b'{"a":' * 5_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{}{}", b"null", b"1e99999", b'"', b"-", b""),
    *(
        b'{"inputs":[],"inputs":[]}',
        b'{"inputs":{}}',
        b'{"inputs":[{}]}',
        b'{"inputs":[{"name":"x","shape":[1,16]}]}',
        b"[]",
        b"{}",
    ),
)


def junk(rng: Random) -> Any:
    """Return some value that a field does not expect."""
    return rng.choice(
        (rng.choice(INTEGERS), rng.choice(TEXTS), rng.choice(SHAPES), rng.choice(DATA), None, True, False, {}, [], 0.5, -1e300)
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in a tree."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):  # long data would hide the rest
            yield value, index
            yield from _places(value[index])


def mutated_tree(rng: Random, tree: Any) -> Any:
    """Return a copy of a JSON tree with one to three places replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return tree
        container, key = rng.choice(places)
        choice = rng.random()
        if key == "shape" and choice < 0.7:
            container[key] = copy.deepcopy(rng.choice(SHAPES))
        elif key == "data" and choice < 0.7:
            container[key] = copy.deepcopy(rng.choice(DATA))
        elif choice < 0.55:
            container[key] = copy.deepcopy(junk(rng))
        elif choice < 0.75:
            del container[key]
        elif choice < 0.9 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif isinstance(container, dict):
            container[str(rng.choice(TEXTS))] = container.pop(key)
    return tree


def as_json(tree: Any) -> bytes:
    """Return JSON text: NaN and infinities as Python writes them, lone surrogates escaped."""
    return json.dumps(tree, separators=(",", ":")).encode()


def packed(rng: Random, data: bytes) -> bytes:
    """Return the data as gzip: whole, mutated, cut off, twice, followed by rubbish, or 20 or 40 MB of zeros instead."""
    choice = rng.random()
    if choice < 0.002:
        return _bomb(rng.choice((20, 40)))
    whole = gzip.compress(data, 1, mtime=0)
    if choice < 0.3:
        return whole
    if choice < 0.7:
        return mutated_bytes(rng, whole)
    return rng.choice((whole[: rng.randrange(len(whole))], whole + whole, gzip.compress(whole, 1, mtime=0), whole + b"x", b""))


@cache
def _bomb(megabytes: int) -> bytes:
    return gzip.compress(bytes(megabytes * 10**6), 6, mtime=0)


def mutated_bytes(rng: Random, data: bytes, *, most: int = 4) -> bytes:
    """Return the bytes with a few flipped, inserted, removed, doubled, overwritten or cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(out) + 1)
        choice = rng.randrange(7)
        if choice == 0 and out:
            out[place % len(out)] ^= 1 << rng.randrange(8)
        elif choice == 1:
            out[place:place] = rng.randbytes(rng.randint(1, 4))
        elif choice == 2:
            del out[place : place + rng.randint(1, 8)]
        elif choice == 3:
            out[place:place] = out[place : place + rng.randint(1, 32)]
        elif choice == 4 and out:
            out[place % len(out)] = rng.choice(b"\x00\xff\r\n :;,\"'{}[]0-9%\x7f\x80")
        elif choice == 5:
            out[place : place + 4] = rng.choice(INTEGERS).to_bytes(16, "little", signed=True)[:4]
        else:
            del out[place:]
    return bytes(out)
