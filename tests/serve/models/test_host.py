"""A machine is described by the kernel's files: faked ones here, below a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.models import hardware
from serve.models.host import Host

CPUINFO = """processor\t: 0
model name\t: AMD EPYC 9B45
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
model name\t: AMD EPYC 9B45
flags\t\t: fpu avx2 avx512f avx512_bf16
"""
MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1000000 kB\nMemAvailable:    8000000 kB\n"
GIB = 1 << 30


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path, "x86_64")
    write(host, {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO})
    return host


def write(host: Host, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = host.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_processor_and_cores(host):
    assert (host.processor(), host.cores()) == ("AMD EPYC 9B45", 2)
    assert {"avx2", "avx512_bf16"} <= host.instructions()


def test_an_arm_processor_names_its_features_and_not_itself(tmp_path):
    host = Host(tmp_path, "aarch64")
    write(host, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"})
    assert host.processor() == "aarch64" and "bf16" in host.instructions()


def test_without_a_control_group_everything_may_be_used(host):
    assert host.core_limit() is None
    assert (host.total_memory(), host.free_memory()) == (16_000_000 * 1024, 8_000_000 * 1024)


def test_the_smallest_limit_of_the_groups_around_this_process_holds(host):
    write(
        host,
        {
            "proc/self/cgroup": "0::/system.slice/loradock.service\n",
            "sys/fs/cgroup/system.slice/loradock.service/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/system.slice/loradock.service/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/system.slice/loradock.service/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/system.slice/memory.max": "max\n",
        },
    )
    assert host.core_limit() == 1.5
    assert (host.total_memory(), host.free_memory()) == (4 * GIB, 1 * GIB)


def test_files_that_the_kernel_only_caches_leave_room_in_a_group(host):
    write(
        host,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {GIB}\ninactive_file {3 * GIB}\n",
        },
    )
    assert host.free_memory() == 3 * GIB


def test_a_limit_of_control_groups_version_1(host):
    write(
        host,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
            # In a container the group's own folder is the top.
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert host.core_limit() == 2
    assert host.free_memory() == GIB
    write(host, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    write(host, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"})
    assert host.core_limit() is None
    assert host.free_memory() == 8_000_000 * 1024


@pytest.mark.parametrize(
    "line, version",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (x)", "580.82.07"),
    ],
)
def test_gpu_and_driver(host, line, version):
    assert (host.gpus(), host.nvidia_driver()) == ([], "")
    write(host, {"proc/driver/nvidia/version": line + "\nGCC version: gcc 12.2.0\n"})
    assert host.nvidia_driver() == version
    write(host, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n"})
    assert host.gpus() == [], "this process may use none"
    write(host, {"dev/nvidia0": "", "dev/nvidiactl": ""})
    assert host.gpus() == ["NVIDIA H100 80GB HBM3"]
    write(host, {"dev/nvidia1": ""})
    assert host.gpus() == ["NVIDIA GPU 0", "NVIDIA GPU 1"]


def test_huge_pages(host):
    assert host.huge_pages() == ""
    write(host, {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    assert host.huge_pages() == "madvise"


def test_the_real_machine_has_a_processor_and_memory():
    host = Host()
    assert Path("/proc/cpuinfo").exists() and host.cores() >= 1 and host.processor()
    assert 0 < host.free_memory() <= host.total_memory()
    assert hardware.free_memory() == pytest.approx(host.free_memory(), rel=0.2)
