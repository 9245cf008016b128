"""Load generator: workloads, drivers, reports. Measures servers from outside, without their code."""
