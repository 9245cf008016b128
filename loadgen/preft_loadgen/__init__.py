"""Load generator and benchmarks: workloads, drivers, reports. Meets servers from outside, without their code."""
