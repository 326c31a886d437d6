"""A process that listens: on one machine (`launch`), or replicas on Ray (`ray_serve`); and what it needs (`doctor`).

It starts and ends the app of `serve.api`; it knows no route.
"""
