"""Runtimes: the means by which a lease's command is started, confined, watched and ended on this machine.

`process` is the one built on plain Linux processes; siblings never import each other and meet at `protocols.Runtime`.
"""
