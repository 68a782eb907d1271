"""The command line: one verb per operation of `tenure.verbs`, nothing decided here.

Heavy imports stay inside the commands, so that ``tenure --help`` answers in under 200 ms.
"""
