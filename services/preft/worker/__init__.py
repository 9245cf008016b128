"""A worker: its server, the services of each role (`prefill`, `decode`, `colocated`), its use and its status."""
