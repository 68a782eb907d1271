"""What a container made from the closure costs at start, against the bare process.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread; files in the page cache.
Contenders, interleaved, 15 rounds after 2 of warm-up (--quick: 5 after 1), each a start of its own:
- process: `python -m tenure.serve` from the full environment;
- container: the `oci` form loaded into an engine of the benchmark's own, host network, the same cpus and no memory bound;
- hardened: the same container as the product runs it in a lease (own network, seccomp, read-only root, no capabilities).
Time: from just before the start is asked for (the program's exec; the engine's create + start through its socket) to the end of
the first right answer, asked by HTTP every 5 ms from then on. Removing what was started is not timed.
Bar: median of container / median of process at most 1.1 (`value`); hardened is told beside, no bar.
Checked: the answer is the engine's own, in every round.
Control: the container from the same closure without its byte code, so that every module is compiled anew, must miss the bar.
"""
