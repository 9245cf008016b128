"""The control plane: what a worker process consists of, how Ray starts and restarts workers, how a whole cluster is served."""
