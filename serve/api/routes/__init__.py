"""The routes of the adapter API and of operation, one module per subject.

Inference routes are vLLM's and are not here.
"""

from fastapi import APIRouter

from serve.api.routes import (
    adapters,
    batches,
    data,
    drift,
    files,
    fine_tuning,
    fine_tuning_work,
    golden,
    keys,
    labels,
    loop,
    mixtures,
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
        fine_tuning_work.router,
        moderations.router,
        data.router,
        drift.router,
        golden.router,
        loop.router,
        labels.router,
        mixtures.router,
        adapters.router,
        runtime_lora.router,
        trainer.router,
        keys.router,
    ]
