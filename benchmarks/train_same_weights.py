"""Whether the weights are the same to the last bit for any number of workers and any deaths, and what that costs one worker.

Hashes: SHA-256 over the result's arrays, in the order of their names. Reference: the undisturbed run of one worker.
Simulated: 500 kill schedules (--quick: 60), their W in turn 1, 2, 3, 5, 8, 16. A NumPy network (8 inputs, 16 hidden, 3 classes,
momentum in the weights; 16 shards, 6 rounds, batch 96 with noise from the shard's generator) is trained by the real handler in the
explorer (`tests/train/explorer.py`): each process is killed after an exponentially distributed number of file operations (mean
30, 100 or 300), before or after one or with half a file written; it is started again with the same event; half of
the schedules have slots of 4 s, a third zombies, a third stalls. Adding, gathering, checkpoints and evaluation are done by the
processes that are killed: counted is in how many schedules a death fell between the first and the last operation on a slice of
the sum and on a checkpoint.
Real: 12 runs (--quick: 2), W in turn as above, of ``python -m tenure.train.worker`` processes (the same program, a real folder), of
which one is ended by SIGKILL at random times (mean 0.4 s apart) until 2 W were, and started again by the same event under a higher fence.
Cost: one worker, the handler in a process of its own with a store in the default place for temporary files, against a plain
loop in another: gradient of the whole batch in one call, update, nothing else; one BLAS thread both; 8 shards of 32 samples;
20 rounds (--quick: 8) after 2 that warm up; 7 interleaved repeats (--quick: 3) in new processes; seconds per round, medians. Programs: a
network 784-512-512-10 in NumPy; the conv net of `train_vs_ddp` on CIFAR-10, when torch and the data are there: else it says why not.
The value is the larger ratio of those measured.
Bars: all hashes equal; cost <= 1.3 for each program.
Control: the same training with each worker's shards added on their own and the workers' sums then added, without the fixed tree:
weights after 6 rounds must differ between W = 1 and 3.
"""

NAME = "train_same_weights"
BAR = "SHA-256 of weights equal for W in {1, 2, 3, 5, 8, 16} under 500 kill schedules; one worker <= 1.3 x a plain loop"
