"""Alembic migrations of the ledger, run when it is opened. Add a file in `versions`; never change one that was released."""
