"""The broker: queue, grant, renew, expire, repair. Joins `ledger`, `decide` and `fleet`; exactly one per home.

    handlers ──► queue ──► grants ──┐
                 invocations ───────┼──► attempts ──► fleet ──► agents
                 nodes (terms) ─────┤        │
                 quota (disk) ──────┘        │
                 retention ──► what is old   │
                            all ──► book ──► ledger, placement

Clients use `client` and `launch`, which import none of the above.
"""
