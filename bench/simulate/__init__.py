"""A simulator of the router: the production view, queue and policy over simulated workers, in virtual time.

`cluster` wires a run together. `workload` makes the requests, `prefill`, `memory` and `decode` are the workers,
`policies` has the policies that are compared with the router's own, and `report` shows the figures.
"""
