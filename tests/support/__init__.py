"""What several test suites share: tiny models, adapters made from a seed, and the reference to compare with."""
