"""How long a microVM takes from cold boot to the first answer, with its root on a disk, against all of it in memory.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread, from one closure.
Contenders, interleaved, 5 rounds (--quick: 2), the same kernel, monitor, CPU model, 512 MiB, one CPU:
- disk: the `microvm` form as the product builds it (compressed read-only root on virtio-blk, small initial memory disk);
- memory: the same files all in the initial memory disk (cpio, gzip -1, made by the benchmark), the same init and modules.
Time: from the start of the monitor to the end of the first right answer through the forwarded port, asked every 20 ms. Files of
both are in the host's page cache. Acceleration is what the product's probe finds, the same for both, and told.
Bar: median of disk / median of memory at most 0.65 (`value`). Single run by hand: 7.3 s in memory under emulation.
Checked: the answer is that of the bare process (within `image_answers`' tolerance under emulation), in every round.
Control: the memory form as a contender against itself must miss the bar.
"""
