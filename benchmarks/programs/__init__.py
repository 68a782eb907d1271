"""Training programs that several benchmarks share. Not here: what is measured with them."""
