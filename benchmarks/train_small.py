"""How soon sixteen trivial tasks are through, each under a lease of its own, and what an idle training worker weighs.

World: a broker and one agent with two cores, both up, the fork server warm, the strongest confinement found here (its
sentence is in the details), the ledger a SQLite file. A task is a Python process that computes a square and prints it; its
envelope (1/8 core, 64 MiB, 30 s) is enforced, its lease, attempt and exit are rows of the ledger. One client asks for the
sixteen one by one.
Measured: wall time from the first request until the client holds the sixteenth exit: median of 10 rounds (--quick: 4), one to
warm up. In the same rounds, for the details: the sixteen asked for at once, as one gang.
Second: a training worker (two of a stage of 16 shards, NumPy program, tiny data), waiting for the other one, which is held
back by its program: anonymous + shared + kernel memory as the envelope counts it (the lease's own figure), and RSS of its
process, which counts file pages too; the higher of three looks.
Third: from the order to a worker's first gradient: both as CLOCK_BOOTTIME, told by the broker's note to the worker and by the
program; median of 10 starts (--quick: 4).
Bars: sixteen in 1 s; idle worker 30 MB of envelope memory; first NumPy step after 0.5 s. All must hold.
Checked: sixteen different leases, each `completed` with exit record, enforced bounds in its state, and the right square in
its log.
Reference: Lithops 3.8 on its local host, 0.5 to 10 s (noted on a machine of this kind; not run here).
Control: each task in an agent of its own runtime without warm fork server, one after the other: it must miss the first bar.
"""
