"""What to lease for a goal: plans and runs probes through a `Tunable`, predicts, chooses, and compares with what came.

`training` and `serving` are the two Tunables, `choose` picks the cheapest that qualifies, `tune` runs the loop,
`observe` sets predictions against observations. Grants nothing and starts nothing itself.
"""
