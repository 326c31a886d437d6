"""Prometheus rules, Alertmanager routes and Grafana dashboards, rendered from the server's configuration.

Nothing here runs in the server; `loradock monitoring render` writes it.
"""
