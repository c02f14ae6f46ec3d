"""Training sessions of remote clients: sessions, runs, futures, checkpoints and samplers. Free of HTTP."""
