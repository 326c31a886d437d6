"""The page at `/dashboard`: its files, and the routes that serve them.

No figure is made here; the page asks the API.
"""
