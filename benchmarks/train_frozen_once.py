"""Whether ten epochs over cached features cost one pass through the frozen part, the head's own time, and next to nothing else.

World: CIFAR-10 images of the data folder (uint8 32 x 32 x 3), 100 per class to train and 20 held out (--quick: 20 and 10). The
frozen part is MobileNetV2 with its real weights (ONNX file of the data folder), cut before its classifier, images enlarged to
96 x 96, one thread; the head a softmax layer in NumPy with Adam, batches of 100, 10 epochs, evaluated once per epoch; shards 2.
Timed, each in a new folder without a cache, interleaved, 3 repeats (--quick: 2), after one warm-up that is thrown away:
- cached: the handler of a training worker with one worker, in this process, from its start event to the result. The frozen
  part fills the cache first (chunks, checksums, assembling) and each round reads the memory-mapped features.
- pass: the frozen part alone over the same images in the same batches, results kept in memory. Nothing written.
- head: the same handler with the same program on features that are handed over as arrays in memory: the head's own time.
Median CPU time and wall time of each; judged: CPU seconds (one thread; wall time is told too).
The value is (cached - head) / pass. Bar: <= 1.01.
Checked: cached and head end with the same weights, bit by bit; the accuracy is above 0.5; the frozen part was given each image
once; a second cached run in the same folder's cache gives the frozen part no image at all.
Control: without cache, each round's examples go through the frozen part anew (head, the same 10 epochs); it must miss the bar.
"""

from __future__ import annotations

NAME = "train_frozen_once"
BAR = "10 epochs over cached features: CPU time <= 1.01 x one pass through the frozen part + the head's own time"
