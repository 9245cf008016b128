"""Traffic: which requests are sent, to which adapters, when. Equal seeds give equal traffic. Sends nothing."""
