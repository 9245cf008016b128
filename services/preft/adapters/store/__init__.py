"""An adapter's way to the engine on one machine: disk, host memory, engine slot."""
