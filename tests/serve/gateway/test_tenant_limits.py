"""What a tenant may have open or keep holds also when it asks several servers at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from serve.adapters.registry.registry import Registry
from serve.errors import QuotaExceeded
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.batches.file_rows import FileRows
from serve.jobs.batches.objects import Limits as BatchLimits
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.objects import Asked, Job, Limits, Status
from tests.serve.jobs.batches.test_batch_rows import made, stored

SERVERS, MOST = 6, 2
ASKED = Asked("base", "base", "base", "acme/tone", "supervised", {}, 1, "key", "anna")
LIMITS = replace(BatchLimits(), open=MOST, tenant_files=MOST)


def adds_job(registry, number):
    JobRows(registry, Limits(open=MOST), me=str(number)).add(
        Job(f"ftjob-{number}", "acme", Status.VALIDATING, 1000.0, "file-1", None, ASKED)
    )


def adds_batch(registry, number):
    BatchRows(registry, LIMITS, me=str(number)).add(made(f"batch_{number}"))


def adds_file(registry, number):
    FileRows(registry, LIMITS).add(stored(f"file-{number}"))


@pytest.mark.parametrize("add", [adds_job, adds_batch, adds_file])
def test_a_tenant_that_asks_several_servers_at_once_gets_no_more_than_its_limit(url, add):
    start = threading.Barrier(SERVERS)

    def asks(number):
        with Registry(url) as registry:
            start.wait(30)
            try:
                add(registry, number)
            except QuotaExceeded:
                return False
            return True

    with ThreadPoolExecutor(SERVERS) as pool:
        assert sum(pool.map(asks, range(SERVERS))) == MOST
