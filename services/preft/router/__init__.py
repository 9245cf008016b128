"""Sends each request to a prefill and a decode worker, and makes one token stream of the workers' answers."""
