"""Pure deciders: events or measurements in, plans out. No clock, no I/O, no randomness of their own.

`placement` says which lease goes where, `packing` how a gang is fitted on free room, `batching` which requests run
together, `threads` how a model uses its CPUs, `fits` what measurements foretell, `cost` what a held envelope costs.
"""
