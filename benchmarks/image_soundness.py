"""How often a service in its root form misses a file that the exercise did not find: in held-out runs.

Held out: `benchmarks.image_grammar` and its `HELD_OUT_SEED`, committed before any code that makes closures. The analysis never
sees them; it has only the product's own exercise of a served model (NumPy's program: the exercise commands of its author,
`benchmarks/programs/numpy_exercise.py`: batches of 1 and 5, one refused request).
A run: one life of a service in the root form. It starts with drawn options, gets the drawn exchanges, ends as drawn. The same
run is lived by the bare process. 1,000 runs: 200 of each of the 5 engines, over its 3 models (--quick: 8 of each of NumPy, ONNX
Runtime and LiteRT, or as many as fit into 50 s; how many is told).
A miss: a run whose outcome in the root form is not that of the bare process. Outcome: per exchange the status and the answer
(tensors byte by byte, but within `image_answers`' tolerance where requests at once may have shared a batch; of an error its
text with folders and ports taken out; of metrics the names; not that of the request on its way at the end), and the exit code
(after two SIGTERM -15 is 0: an interpreter that ends puts its handlers away). A run that differs is repeated once in both;
what differs then between two lives of the bare process is no miss (timing) but counted as `unsteady`, at most 1 % may be. What
was missed is asked of the product, which must name a file; the closure is repaired by its one command, and the run must then
pass. Every 20th run of the bare process is lived under a trace of file calls besides: a file that it opened with success and
that the closure neither holds nor leaves out by rule is a miss, too (`unseen_files`).
Bar: misses in at most 1 of 1,000 runs (`value`: misses per 1,000), each named and repaired. A miss is repaired after it was
counted, once per file.
So that naming is shown even where nothing is missed: from each closure 3 files that were needed are taken, one at a time (drawn
by the seed: a module, a shared object, a file that is only stat-ed), and all must be named and repaired.
Control: the same closures without the files that were only stat-ed, as tools that trace `open` make them: the first run of
every engine must miss.
"""
