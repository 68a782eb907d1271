"""`python -m tenure.serve.images MODEL FILES…`: the command line of `images`. One line per file, in order.

Exit: 0 every file was answered, 1 some were skipped (each with its reason), 2 wrong use or the model can't be used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tenure.errors import TenureError
from tenure.serve.client import Model
from tenure.serve.images import Classified
from tenure.serve.pixels import FORMATS, NORMALISATIONS, pictures_in, preparation_for
from tenure.serve.processes import leased_threads


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except (TenureError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2


def _run(options: argparse.Namespace) -> int:
    labels = options.labels.read_text().splitlines() if options.labels else []
    cores = leased_threads(os.environ)
    in_process = os.path.exists(options.model)
    model = Model(
        options.model,
        options.name,
        timeout_s=options.timeout_s,
        threads=options.threads or 1,
        instances=options.instances or (cores if in_process else 1),
    )
    answered = skipped = 0
    began_s = time.monotonic()
    with model:
        how = preparation_for(model.metadata(), normalise=options.normalise, crop=options.crop, size=options.size)
        results = model.classify(
            _files(options.files),
            top=options.top,
            preparation=how,
            output=options.output,
            batch=options.batch,
            workers=options.workers,
        )
        for each in results:
            answered, skipped = answered + (not each.error), skipped + bool(each.error)
            sys.stdout.write((_as_json(each, labels) if options.json else _as_text(each, labels)) + "\n")
    took_s = time.monotonic() - began_s
    rate = f"{(answered + skipped) / took_s:.1f} files/s" if took_s > 0 else ""
    sys.stderr.write(f"{answered} answered, {skipped} skipped, {rate}\n")
    return 1 if skipped else 0


def _files(named: Sequence[str]) -> Iterator[str]:
    """Yield the files meant: as they are, those of a folder in order of their names, or one per line of standard input."""
    for each in named:
        if each == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(each):
            yield from pictures_in(each)
        else:
            yield each


def _as_text(each: Classified, labels: Sequence[str]) -> str:
    if each.error:
        return f"{each.path}: skipped: {each.error}"
    named = (f"{_label(place, labels) or place} {score:g}" for place, score in zip(each.classes, each.scores, strict=True))
    return f"{each.path}: {', '.join(named)}"


def _as_json(each: Classified, labels: Sequence[str]) -> str:
    if each.error:
        return json.dumps({"file": each.path, "error": each.error})
    found = [
        {"class": place, "score": score, **({"label": _label(place, labels)} if labels else {})}
        for place, score in zip(each.classes, each.scores, strict=True)
    ]
    return json.dumps({"file": each.path, "classes": found})


def _label(place: int, labels: Sequence[str]) -> str:
    return labels[place] if place < len(labels) else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tenure.serve.images",
        description="Classify image files: reading, decoding and inference overlapped, in bounded memory. Prints one line "
        "per file, in order, and at the end a summary on standard error. Files that can't be read or decoded are skipped "
        "with their reason.",
        epilog="Exit: 0 every file was answered, 1 some were skipped, 2 wrong use or the model can't be used.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model file, http://, shm:// or grpc://host:port, or a name at $TENURE_SERVE"
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help=f"{', '.join(FORMATS)}; a folder of them; - reads one path per line"
    )
    parser.add_argument("--name", help="which model of a server")
    parser.add_argument("--top", type=int, default=5, help="classes printed per file (5)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one per line, the first is class 0")
    parser.add_argument(
        "--normalise",
        choices=list(NORMALISATIONS),
        help="what a model of floats was trained on: none 0..255, unit 0..1, signed -1..1, imagenet mean and deviation",
    )
    parser.add_argument("--crop", type=float, default=0.875, help="part of the shorter side kept, in the middle (0.875)")
    parser.add_argument("--size", type=int, default=0, help="height and width, where the model takes any")
    parser.add_argument("--output", default="", help="the output that holds the scores, where there are several")
    parser.add_argument("--batch", type=int, default=0, help="files per request (8, where the model takes any number)")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode and ask (1.5 x usable cores)")
    parser.add_argument("--instances", type=int, default=0, help="copies of a model file in this process (usable cores)")
    parser.add_argument("--threads", type=int, default=0, help="per instance (1)")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="of one request")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser
