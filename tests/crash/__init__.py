"""The crash explorer: kills the real broker, agents, shims and clients at every effect they have, and recounts what is left.

explorer ──► scenario (the client) ──► broker ──► agents ──► fork servers ──► shims ──► jobs (`job`)
    │             all Python processes of a run load `hooks`: they note each effect, and die at the one they are told
    └──► oracle   recounts from the process table, the groups, the files and the journals outside the home
"""
