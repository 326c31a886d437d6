"""OpenTelemetry's traces, metrics and events of requests: spans, their encoding, and the SDK's part.

It reads exchanges that have ended; nothing here changes one.
"""
