"""Whether a training worker leaves in time, whatever its slot and its steps, and how much of the slot it uses.

World: the process runtime with its real shims: SIGKILL comes at the slot's end, without grace. The worker is `python -m
tenure.train.worker` on a stage of its own; a small driver starts the event of its next slot as the broker does, with the same
slot again. Slots of 2, 5, 10, 30 and 60 s (--quick: 2, 5, 10 and 20), steps of 10, 100 and 700 ms: each pair is a case. A
step is one shard's gradient: a matrix product, then sleep, so that all cases of one set can run beside each other on two
cores. Its length follows the clock: base x (1.3 + 0.3 sin(2 pi t / 7 s)) x a random 0.9 to 1.1, as on a machine with
neighbours. 8 shards a round; slots of up to 10 s follow each other for 20 s, longer ones twice each.
Measured, by the program itself (CLOCK_BOOTTIME of the first step's begin and of each step's end, in a file), never by the
code under test: start = order to first step's begin; used = first step's begin to last step's end; share = used / (slot -
start). Publishing and combining between two steps count as used, computing a step twice does not: repeated steps are taken
off. The last slot of a case, in which training is stopped from outside, is left out.
Value: the least share over all slots that do not hold by the second way. Bars: no slot killed by its deadline, and in each
slot a share of at least 0.97, or no more left over than its longest step took.
Checked: after the cases, each store's finished rounds are as many as its steps allow, and no step is missing.
Control: the study's way, as many steps per slot as fitted into the first one (there: 68 in 15 minutes), the same steps: it
must be killed, or leave more than 3 % and a step.
"""
