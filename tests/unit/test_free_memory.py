"""Free memory within the limits of control groups, versions 1 and 2, nested and in containers."""

import pytest
import torch

from openmimo.runtime import device
from openmimo.runtime.device import free_cgroup_bytes, free_memory_bytes

MIB = 1 << 20


def _group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def _membership(tmp_path, line):
    path = tmp_path / "membership"
    path.write_text(f"9:name=systemd:/\n{line}\n")
    return path


def test_version_2_takes_the_tightest_of_nested_limits(tmp_path):
    mount = tmp_path / "mount"
    _group(mount, cgroup__procs="")
    _group(mount / "a", memory__max=500 * MIB, memory__high="max", memory__current=300 * MIB)
    own = {"memory__max": "max", "memory__high": 400 * MIB, "memory__current": 250 * MIB}
    _group(mount / "a/b", **own, memory__stat=f"anon {MIB}\ninactive_file {30 * MIB}")
    assert min(free_cgroup_bytes(_membership(tmp_path, "0::/a/b"), mount)) == 180 * MIB
    _group(mount / "a", memory__current=450 * MIB)
    assert min(free_cgroup_bytes(_membership(tmp_path, "0::/a/b"), mount)) == 50 * MIB
    _group(mount / "a", memory__current=600 * MIB)
    assert min(free_cgroup_bytes(_membership(tmp_path, "0::/a/b"), mount)) == 0


def test_version_2_without_limits_says_nothing(tmp_path):
    _group(tmp_path / "mount/a", memory__max="max", memory__high="max", memory__current=MIB)
    assert free_cgroup_bytes(_membership(tmp_path, "0::/a"), tmp_path / "mount") == []
    assert free_cgroup_bytes(tmp_path / "none", tmp_path / "mount") == []


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_a_container_reads_the_root_of_its_mount(tmp_path, path):
    mount = tmp_path / "mount"
    _group(mount, memory__max=100 * MIB, memory__current=40 * MIB)
    assert free_cgroup_bytes(_membership(tmp_path, f"0::{path}"), mount) == [60 * MIB]


def test_version_1(tmp_path):
    mount = tmp_path / "mount"
    _group(mount / "memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=MIB)
    group = mount / "memory/a"
    _group(group, memory__limit_in_bytes=100 * MIB, memory__usage_in_bytes=90 * MIB)
    _group(group, memory__stat=f"total_inactive_file {20 * MIB}")
    assert min(free_cgroup_bytes(_membership(tmp_path, "4:cpu,memory:/a"), mount)) == 30 * MIB


def test_free_memory_honors_the_limits(monkeypatch):
    monkeypatch.setattr(device, "free_cgroup_bytes", lambda: [300 * MIB, 7 * MIB])
    assert free_memory_bytes(torch.device("cpu")) == 7 * MIB
