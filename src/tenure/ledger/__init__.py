"""The ledger: what was asked, granted, used and learned, in SQL. Only the broker writes it.

Promises: `Ledger` and `Transaction` (`ledger.store`), and one named function per query (`ledger.queries`).
"""
