"""The HTTP surface: the app, its routes, what their bodies carry, and the services behind them.

Routes are thin: they read a request, call a service and spell the answer. Rules live below.
"""
