"""Load generator: measures servers of language models from outside, without their code. See docs/loadgen.md.

- `traffic` makes requests: lengths, prompts, adapters, times. Sends nothing.
- `transport` sends one request over HTTP or gRPC and returns its answer with arrival times.
- `measure` sends many requests and records them: loops, sweeps, comparisons, checks.
- `report` turns records into figures, tables, files and plots.
"""
