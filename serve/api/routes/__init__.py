"""The routes of the adapter API and of operation, one module per subject.

Inference routes are vLLM's and are not here.
"""

from fastapi import APIRouter

from serve.api.routes import (
    adapters,
    batches,
    drift,
    files,
    fine_tuning,
    golden,
    keys,
    labels,
    moderations,
    overview,
    runtime_lora,
    server,
    trainer,
    usage,
)


def routers() -> list[APIRouter]:
    """In this order: a path that ends in an adapter's name, which may hold slashes, comes after the longer ones."""
    return [
        server.router,
        usage.router,
        overview.router,
        files.router,
        batches.router,
        fine_tuning.router,
        moderations.router,
        drift.router,
        golden.router,
        labels.router,
        adapters.router,
        runtime_lora.router,
        trainer.router,
        keys.router,
    ]
