"""How the broker reaches its agents: `contract` is what it needs, `local` is sockets on this machine, `fake` is for tests."""
