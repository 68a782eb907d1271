import os
import subprocess
import sys
from pathlib import Path

from tenure.meter import cgroups
from tenure.meter.machine import capacity, machine, versions


def test_machine_names_the_cpu_its_relevant_features_and_this_python():
    here = machine()
    assert here.cpu_model
    assert list(here.cpu_features) == sorted(here.cpu_features)
    assert here.python.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert here.cpu_model in here.machine_class


def test_capacity_never_exceeds_affinity_or_ram(tmp_path):
    offered = capacity(tmp_path / "not" / "yet" / "made")
    assert 0 < offered.cpus <= len(os.sched_getaffinity(0))
    assert 1 << 26 < offered.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert offered.disk_bytes > 0


def test_versions_leaves_out_what_is_not_installed():
    found = versions("numpy", "no-such-distribution-here")
    assert set(found) == {"numpy"}


def test_machine_loads_no_heavy_library():
    code = "import sys, tenure.meter.machine as m; m.machine(); print(sorted({'numpy','psutil','pynvml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    if not Path("/dev/nvidiactl").exists():
        assert done.stdout.strip() == "[]"


def fake_proc(tmp_path: Path, *, mounts: str, own: str) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(mounts)
    (proc / "self/cgroup").write_text(own)
    (proc / "cgroups").write_text("#name\tid\nmemory\t1\t1\t1\ncpu\t2\t1\t1\ncpuacct\t2\t1\t1\n")
    return proc


def group(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cgroup.procs").write_text("")
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_the_tightest_limit_of_all_v2_groups_above_counts(tmp_path):
    root = group(tmp_path / "cg", cgroup__controllers="cpu memory", memory__max="max")
    group(root / "a", cpu__max="150000 100000", memory__max=str(1 << 30))
    group(root / "a/b", cpu__max="max 100000", memory__max=str(2 << 30))
    proc = fake_proc(tmp_path, mounts=f"1 2 0:1 / {root} rw - cgroup2 cgroup2 rw\n", own="0::/a/b\n")
    assert cgroups.own_paths(proc=proc) == {"unified": root / "a/b"}
    assert cgroups.cpu_quota(proc) == 1.5
    assert cgroups.memory_limit_bytes(proc) == 1 << 30


def test_v1_quota_and_limit_are_read_and_minus_one_means_none(tmp_path):
    cpu = group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(cpu / "job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    memory = group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    mounts = (
        f"1 2 0:1 / {cpu} rw - cgroup cgroup rw,cpu,cpuacct\n1 2 0:1 / {memory} rw - cgroup cgroup rw,memory\n"
        "1 2 0:9 / /tmp rw - tmpfs tmpfs rw\n"
    )
    proc = fake_proc(tmp_path, mounts=mounts, own="2:cpu,cpuacct:/job\n1:memory:/\n")
    assert cgroups.cpu_quota(proc) == 0.5
    assert cgroups.memory_limit_bytes(proc) is None


def test_inside_a_container_the_group_is_found_below_the_mounted_part(tmp_path):
    root = group(tmp_path / "cg", memory__max=str(3 << 20))
    proc = fake_proc(tmp_path, mounts=f"1 2 0:1 /docker/x {root} rw - cgroup2 cgroup2 rw\n", own="0::/docker/x\n")
    assert cgroups.memory_limit_bytes(proc) == 3 << 20
