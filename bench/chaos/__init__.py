"""`make chaos`: faults under load on a real cluster, with every answer compared token for token."""
