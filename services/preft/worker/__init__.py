"""A worker's parts that are the same for all roles: the counts of its use, and the stream of its status."""
