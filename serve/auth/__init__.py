"""Who is asking, and what they may use: API keys, scopes, rate limits, token usage, the audit log.

It judges callers; it knows no engine and no version.
"""
