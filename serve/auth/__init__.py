"""Who asks, and how much they may: API keys, tenants' scopes, rate limits, token usage, the audit log.

It judges a caller; it knows no engine and no version.
"""
