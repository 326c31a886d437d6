"""Threads are counted as OpenMP counts them, by the plan and by the steps alike."""

from __future__ import annotations

import os

import pytest
import torch

from optimize import processor
from optimize.checkpoint.model import settle


@pytest.mark.parametrize("said, taken", [("3", 3), ("3,2", 3), ("", None), ("many", None), ("0", None)])
def test_openmp_s_threads_are_read_as_it_reads_them(monkeypatch, said, taken):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    before = torch.get_num_threads()
    try:
        settle(0)
        assert processor.threads() == torch.get_num_threads() == (taken or len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)
