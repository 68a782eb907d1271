"""Benchmarks: each measures one bar. `python -m benchmarks --list` names them; README.md says how to write one."""
