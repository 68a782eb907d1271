"""One of two processes that train `cifar_conv` with plain torch, and nothing of ours.

    python -m benchmarks.programs.torch_pair MODE RANK FOLDER OPTIONS

MODE: ``ddp`` (DistributedDataParallel over gloo on the loopback) or ``plain`` (alone; the two only begin together). FOLDER:
where both meet. OPTIONS: JSON with arrays, seed, shard, parts, warm_up, steps, rate, momentum. Prints, last, JSON with wall_s
and cpu_s of the counted steps and each step's mean loss. DDP is set up in its own favour: no copies between gradients and
buckets, no broadcast of batch statistics.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from benchmarks.programs.cifar_conv import Net

PATIENCE_S = 60.0


def main() -> None:
    """Train, and print what it took."""
    mode, rank, folder, options = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(options["seed"])
    net: nn.Module = Net()
    if mode == "ddp":
        distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    print(json.dumps(train(net, rank, options, began=lambda: meet(folder, rank))), flush=True)
    if mode == "ddp":
        distributed.barrier()
    os._exit(0)  # gloo's threads now and then end a process that takes itself apart with "terminate called"


def train(net: nn.Module, rank: int, options: dict[str, Any], *, began: Callable[[], None]) -> dict[str, Any]:
    """Return wall_s and cpu_s of the counted steps, and the mean loss of every step over this rank's examples."""
    optimizer = torch.optim.SGD(net.parameters(), lr=options["rate"], momentum=options["momentum"])
    x, y = (np.load(Path(options["arrays"]) / f"{name}_train.npy", mmap_mode="r") for name in "xy")
    shard, parts, batch = options["shard"], options["parts"], options["shard"] * options["parts"] * 2
    steps = options["warm_up"] + options["steps"]
    passes = -(-steps * batch // len(x))
    order = np.concatenate([np.random.default_rng((options["seed"], number)).permutation(len(x)) for number in range(passes)])
    losses, wall_s, cpu_s = [], 0.0, 0.0
    for step in range(steps):
        if step == options["warm_up"]:
            began()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
        losses.append(0.0)
        for part in range(parts):
            first = step * batch + (rank * parts + part) * shard
            chosen = order[first : first + shard]
            images = torch.from_numpy(x[chosen]).permute(0, 3, 1, 2).to(torch.float32).div_(255)
            last = part == parts - 1
            with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
                loss = nn.functional.cross_entropy(net(images), torch.from_numpy(y[chosen]))
                (loss / parts).backward()
            losses[-1] += float(loss.detach()) / parts
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s, "losses": losses}


def meet(folder: Path, rank: int) -> None:
    """Wait until the other process is as far, so that both are measured at once."""
    (folder / f"warm-{rank}").touch()
    until = time.monotonic() + PATIENCE_S
    while not (folder / f"warm-{1 - rank}").exists():
        if time.monotonic() > until:
            raise TimeoutError(f"the other process was not warm within {PATIENCE_S} s")
        time.sleep(0.001)


if __name__ == "__main__":
    main()
