"""The names of adapters, the versions behind the names, and the ways to add them."""
