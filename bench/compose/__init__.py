"""What `make test-compose` runs: docker-compose.yml in real containers, with faults under load."""
