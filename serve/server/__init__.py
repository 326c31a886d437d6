"""A process that listens: one on one machine (`launch`), or replicas on Ray (`ray_serve`).

It starts and ends the app of `serve.api`; it knows no route.
"""
