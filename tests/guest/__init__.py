"""A machine with unified control groups for the tests, whatever this one has: Debian's cloud kernel in QEMU.

`image` makes its root from this machine's own files, `machine` boots it, `inside` is what runs there, `worlds` what it runs.
"""
