"""The routes of the adapter API and of operation; inference is not among them."""

from fastapi import APIRouter

from serve.api.routes import adapters, drift, keys, server


def routers() -> list[APIRouter]:
    """In this order: a path that ends in an adapter's name, slashes and all, stands behind those that say more."""
    return [server.router, drift.router, adapters.router, keys.router]
