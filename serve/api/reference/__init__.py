"""`/openapi.json` and `/docs`: every route that this server answers, for programs and for people.

It describes; it answers nothing itself, and what it says is read from the routes and from vLLM's request models.
"""
