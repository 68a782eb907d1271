"""Whether anything in training has an effect twice, or is missing, in whatever order processes go on and wherever they die.

Explored: 100,000 interleavings (--quick: 600) of the real handler, slot, exchange and store, run as greenlets over a disk in
memory (`tests/train/explorer.py`). Each is a schedule drawn from its number: 2 or 3 workers, 3 to 5 shards, 2 or 3 rounds of a
program of a few floats, both exchanges; a random walk, or priorities that change at random points; deaths at file operations
(before, after, in the middle of a write; every 40, 120 or 400 operations in the mean, or none), at sleeps and invocations; the
same event again under a higher fence; zombies; stalls of up to three claim periods; clocks that are off, fast, slow or stand
still; slots; a second generation with 1 to 3 workers in the middle; files cut off or changed; everything killed at once
with what was not forced to disk torn; a loss that becomes NaN; LINKs whose answer is lost.
An effect, a double effect, a double start: as `tests/train/oracle.py` defines them. Missing: no result, no record of a round, a
failure that nobody names, a run that does not end within 40,000 operations and 900 s of its time.
Raced: 1,000 times (--quick: 20) eight real processes publish the same claim, slices, record, checkpoint and result of a real
store at the same time (`tests/train/races.py`), in a new folder of the default place for temporary files.
Replaced: in 500 runs (--quick: 20) of three workers whoever is to add a slice, by turn or claim, dies at any operation from
when it is due until it is published, and then, in half of them, whoever claimed it too (`tests/train/replacement.py`). Measured:
claim periods from the last death to the takeover, in the run's time. An observer looks every 0.02 periods, so the bound is one
period and two such looks: it sees the claim one look late, and its lapse another.
The value is the number of double and missing effects, explored and raced. Double starts are counted, and each count is compared with
one made beside the store's own.
Bars: 0; every dead claimer replaced within its bound.
Controls: the explorer must notice each of four protocols with one protection taken out (`tests/train/mutants.py`) within 200
schedules, among them the study's "count == W, then start"; in full runs that one must also have several starters in some of the
first 200 real races.
Interrupted, a full run goes on where it stopped, with the same seed and source (``results/train_exactly_once.*.progress``).
Not counted: power cuts on a real disk, NFS, more than three workers at once (random deaths with up to 16:
`train_same_weights`).
"""

NAME = "train_exactly_once"
BAR = "100,000 interleavings, 1,000 races of 8 processes: 0 double or missing effects; dead claimer replaced in a claim period"
