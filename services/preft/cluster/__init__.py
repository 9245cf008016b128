"""The control plane: worker processes, their start and restart by Ray, and the wiring of a whole cluster."""
