"""How long the analysis of the largest engine's service takes.

Service: PyTorch with the perceptron of `benchmarks.image_models` in our server.
Measured: wall time of `tenure image analyse` of that service with the product's own exercise, by the command line, from start
to exit: trace, exercise, import and ELF analysis, hashes, lock file written. 3 times (--quick: once), files in the page cache
(one start of the service before). CPU time of the whole tree beside it.
Bar: median at most 60 s (`value`, seconds).
Checked: the lock holds libtorch_cpu.so, the model and every file of three held-out runs of `benchmarks.image_grammar`, by
living those in the root form; a quick analysis that makes a useless closure does not count.
Control: the same analysis with files merely opened kept: its closure must fail that check.
"""
