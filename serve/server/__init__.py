"""A server out of its parts (`assembly`), and a process that listens: alone (`launch`), or on Ray (`ray_serve`).

It starts and ends the parts, over the app of `serve.api`; it knows no route. `doctor` says what it needs.
"""
