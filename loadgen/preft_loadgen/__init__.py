"""Load generator and benchmarks: workloads, drivers, reports. Measures servers from outside, without their code."""
