"""Who asks, and what they may do: API keys, tenants' views of the catalog, limits, and the accounts of usage.

Knows no transport: HTTP and gRPC both ask `Access` for the caller of a request.
"""
