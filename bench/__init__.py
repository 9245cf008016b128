"""Measurements that need no running cluster, and the results of all measurements."""
