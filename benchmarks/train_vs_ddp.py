"""Training through a shared folder beside torch DDP: samples per CPU-second and samples per second, two workers.

World: `programs/cifar_conv.py` with batch normalisation (262,026 parameters), CIFAR-10 training images of the data folder
decoded once to uint8 arrays (25,000; --quick: 5,000), SGD, rate 0.02, momentum 0.9, cross entropy. A step is 512 examples:
8 parts of 64, accumulated, then one update. Two workers take 4 parts each. One thread per process in every contender.
Contenders, each a fresh pair of processes, in interleaved rounds (5; --quick: 2) whose order is shuffled by the seed:
- tenure: two `python -m tenure.train.worker`, started by this module as a broker would (no broker, no lease: their costs are
  other benchmarks'), `shards = 8, batch = 512, same_result = false`, exchange in its fast mode, the folder on this machine;
- ddp: two processes, torch DistributedDataParallel over gloo on the loopback, `no_sync` for the first three of four parts;
- plain: two processes at once that know nothing of each other, each a loop over its own 4 parts and its own update.
All read the same memory-mapped arrays, permuted anew for each pass, convert a part with the same rule (uint8 / 255, channels
first) and call the same module and torch.optim.SGD. DDP and plain take the examples of a part by one index, as Tenure does.
Counted: 24 steps (--quick: 8) after 4 to warm up: wall time from the end of the 4th step to the end of the last, and in the
same span the CPU time of both processes, all threads. Start-up, imports, the last checkpoint and evaluation are not counted:
the stage evaluates in its last round only and stops one step after the span. Tenure's processes are watched from outside
(the round's record for the time, /proc/PID/stat for CPU, 10 ms ticks); the others tell their own clocks.
Value: the median over rounds of Tenure's samples per CPU-second over DDP's in the same round. Also, by medians of ratios in
the same round: samples/s over DDP's, and samples/s over plain's.
Bars: >= 1.0, >= 0.95 and >= 0.9. All must hold.
Checked before a figure counts: every process ended well; every contender made the steps it claims; the mean training loss
of the last steps is below the first step's in all, and Tenure's is within a tenth of DDP's (both follow the same rule).
Control: the same stage cut into 256 shards of 2 examples, which must miss the samples per CPU-second: accumulation that is
too fine pays for calls and exchange. Run once a round, as the others.
Not counted: accuracy (train_communication), two machines (the folder and the loopback are both local here).
"""

from __future__ import annotations

from benchmarks.harness import Options, Result, Skip

NAME = "train_vs_ddp"
BAR = "two workers >= 1.0 x torch DDP in samples per CPU-second, >= 0.95 x in samples/s, >= 0.9 x two plain processes"


def run(options: Options) -> Result:
    """Not measured yet: the definition comes before the code."""
    raise Skip("the exchange that this measures is being built")
