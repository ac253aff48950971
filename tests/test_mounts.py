"""Whether the locks of a process are this machine's, or its container's own: fake roots, and real mount namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cards import Cards, local_pool
from gpupool_sync import Endpoint, ExclusivityWarning, GPUPool
from gpupool_sync.cli import main
from gpupool_sync.errors import LeaseStoreError
from gpupool_sync.leases import host, mounts
from gpupool_sync.leases.host import HostStore
from gpupool_sync.server.leases import open_leases
from gpupool_sync.testing import FakeFleet
from test_host_processes import PATH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts of Linux")

#: Lines of mountinfo; the directory in question is on the mount 99.
DISK = "20 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw"
DOCKER = "20 1 0:50 / / rw,relatime master:7 - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/ABC,upperdir=/u"
OVERLAY = "20 1 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/u"
LOCKS = "/run/lock/gpupool_sync"


def on_root(line):
    return "99" + line.removeprefix("20")


@pytest.fixture
def fake(tmp_path):
    """Makes a root directory; returns what `why_private` and `container` say there."""
    here = os.open(tmp_path, os.O_RDONLY)

    class Fake:
        def __init__(self, *lines, marks=(), cgroup="0::/\n", environ=None):
            proc = tmp_path / "proc" / "self"
            (proc / "fdinfo").mkdir(parents=True)
            (proc / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
            (proc / "fdinfo" / str(here)).write_text("pos:\t0\nflags:\t0200000\nmnt_id:\t99\nino:\t1\n")
            (proc / "cgroup").write_text(cgroup)
            for mark in marks:
                (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / mark).touch()
            self.environ = environ or {}

        def container(self):
            return mounts.container(str(tmp_path), self.environ)

        def why_private(self, path=LOCKS):
            return mounts.why_private(here, path, str(tmp_path), self.environ)

        def bind_propagation(self, path):
            return mounts.bind_propagation(here, path, str(tmp_path))

    yield Fake
    os.close(here)


@pytest.mark.parametrize(
    ("given", "sign"),
    [
        ({"lines": [OVERLAY], "marks": [".dockerenv"]}, "Docker (/.dockerenv)"),
        ({"lines": [OVERLAY], "marks": ["run/.containerenv"]}, "Podman (/run/.containerenv)"),
        ({"lines": [OVERLAY], "marks": [".singularity.d/x"]}, "Apptainer"),
        ({"lines": [OVERLAY], "marks": ["var/run/secrets/kubernetes.io/serviceaccount/token"]}, "Kubernetes"),
        ({"lines": [OVERLAY], "environ": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}}, "Kubernetes (the variable"),
        ({"lines": [OVERLAY], "environ": {"container": "podman"}}, "podman (the variable container)"),
        ({"lines": [OVERLAY], "cgroup": f"12:pids:/docker/{'0a' * 32}\n"}, "/proc/self/cgroup"),
        ({"lines": [OVERLAY], "cgroup": "0::/kubepods.slice/kubepods-besteffort.slice/x\n"}, "/proc/self/cgroup"),
        ({"lines": [OVERLAY], "cgroup": "0::/machine.slice/libpod-12ab.scope\n"}, "/proc/self/cgroup"),
        ({"lines": [DOCKER]}, "what is mounted at /)"),
        (
            {"lines": [OVERLAY, "30 20 259:2 /var/lib/kubelet/pods/1/etc-hosts /etc/hosts rw - ext4 /dev/sda1 rw"]},
            "what is mounted at /etc/hosts)",
        ),
        ({"lines": [], "marks": [".dockerenv"]}, "Docker"),
        # None of these is one.
        ({"lines": [DISK]}, None),
        ({"lines": [DISK], "marks": [".dockerenv"]}, None),  # an image that was unpacked onto a disk
        ({"lines": [DISK, DOCKER.replace(" / / ", " / /var/lib/docker/overlay2/1/merged ")]}, None),  # it runs Docker
        ({"lines": [DISK], "cgroup": "0::/system.slice/docker.service\n"}, None),
        ({"lines": [DISK], "environ": {"container": "my-box", "KUBERNETES_SERVICE_HOST": ""}}, None),
        ({"lines": [OVERLAY]}, None),  # a machine without a disk
        ({"lines": []}, None),
    ],
)
def test_containers_are_known_by_their_signs(fake, given, sign):
    """Each way in which a runtime shows, alone; and what looks similar, but is a machine."""
    found = fake(*given.pop("lines"), **given).container()
    assert found is None if sign is None else sign in found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (on_root(DOCKER), "on its own root file system (overlay)"),
        ("99 20 0:60 / /run rw - tmpfs tmpfs rw", "on a tmpfs at /run that seems to be its own"),
        ("99 20 0:60 / /run/lock rw shared:5 - tmpfs tmpfs rw", "seems to be its own"),
        (
            f"99 20 8:1 /var/lib/docker/volumes/{'0b' * 32}/_data {LOCKS} rw - ext4 /dev/sda1 rw",
            "a volume that was made",
        ),
        (
            f"99 20 8:1 /var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/l {LOCKS} rw - ext4 /dev/sda1 rw",
            "emptyDir",
        ),
        ("77 20 0:60 / /else rw - tmpfs tmpfs rw", "not known to be mounted from the host"),
        # Mounted from the host.
        (f"99 20 0:25 /lock/gpupool_sync {LOCKS} rw,nosuid - tmpfs tmpfs rw", None),
        ("99 20 0:25 /lock /run/lock rw,nosuid - tmpfs tmpfs rw", None),
        ("99 20 0:26 / /run/lock rw,nosuid master:9 - tmpfs tmpfs rw", None),
        (f"99 20 0:26 / {LOCKS} rw,nosuid - tmpfs tmpfs rw", None),
        (f"99 20 8:1 /var/lib/docker/volumes/locks/_data {LOCKS} rw - ext4 /dev/sda1 rw", None),
        (f"99 20 8:1 /a\\040b/locks {LOCKS} rw - ext4 /dev/sda1 rw", None),
    ],
)
def test_a_lock_directory_in_a_container(fake, line, words):
    """Only what was mounted from the host is the host's; in doubt it is not."""
    found = fake(DOCKER, "nonsense", "", line, marks=[".dockerenv"]).why_private()
    if words is None:
        assert found is None
    else:
        assert words in found
        assert LOCKS in found
        assert "container" in found


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("99 20 0:26 / /run/lock rw,nosuid shared:9 - tmpfs tmpfs rw", "rslave"),
        ("99 20 0:26 / /run/lock rw,nosuid master:9 - tmpfs tmpfs rw", "rslave"),
        ("99 20 0:26 / /run/lock rw,nosuid - tmpfs tmpfs rw", None),  # Docker would refuse a slave of it
        ("99 20 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw", "rprivate"),
        (on_root(DISK), "rprivate"),
        ("99 20 8:1 / /run/lock rw shared:5 - ext4 /dev/sda1 rw", "rprivate"),
        ("77 20 0:60 / /else rw - tmpfs tmpfs rw", "rprivate"),
    ],
)
def test_how_a_container_gets_the_directory_of_the_locks(fake, line, how):
    """By the propagation that shows within, where nothing else does, that it is the machine's."""
    assert fake(DISK, line).bind_propagation("/run/lock") == how


def test_a_machine_has_no_private_locks(fake):
    """Without a container it does not matter what the directory is on."""
    assert fake(DISK, "99 20 0:60 / /run rw - tmpfs tmpfs rw").why_private() is None


def test_a_service_with_a_tmp_of_its_own(fake):
    """PrivateTmp= is no container, and yet nobody else sees the locks."""
    line = "99 20 8:1 /tmp/systemd-private-0123-jupyter.service-x/tmp /tmp rw master:1 - ext4 /dev/sda1 rw"
    assert "PrivateTmp" in fake(DISK, line).why_private("/tmp/gpupool_sync")


def test_the_mount_of_an_open_file(tmp_path):
    """By the kernel's own word, not by comparing paths."""
    fd = os.open("/proc", os.O_RDONLY)
    try:
        found = mounts.mount_of(fd)
        assert (found.kind, found.point) == ("proc", "/proc")
        assert mounts.mount_of(fd, str(tmp_path)) is None
    finally:
        os.close(fd)


# -- who says so -------------------------------------------------------------------------------------------------


@pytest.fixture
def private(monkeypatch):
    monkeypatch.setattr(host, "why_private", lambda fd, path: f"this is a container, and {path} is its own")


def test_a_server_refuses_to_grant_leases_that_nobody_outside_sees(private, tmp_path):
    """One clear error with what to do; --container-ok overrules it."""
    with pytest.raises(LeaseStoreError, match=r"its own: processes outside .* --container-ok"):
        open_leases(str(tmp_path / "locks"), port=1, own=lambda key: True, private_ok=False)
    open_leases(str(tmp_path / "locks"), port=1, own=lambda key: True, private_ok=True).granter.close()


def test_a_pool_in_a_container_says_how_far_its_leases_reach(private, monkeypatch, tmp_path):
    """The scope of its leases says so, and a warning, unless the directory was chosen by somebody."""
    monkeypatch.setattr(host, "default_directory", lambda: str(tmp_path / "private"))
    with local_pool(monkeypatch, Cards(1), lease_store=None) as pool, pool.gpu(timeout=20) as gpu:
        assert gpu.scope == "container"  # and no warning: GPU_POOL_LOCK_DIR is set in tests
    monkeypatch.delenv("GPU_POOL_LOCK_DIR")
    with local_pool(monkeypatch, Cards(2), lease_store=None) as pool:
        with pytest.warns(ExclusivityWarning, match="is its own; mount the host's"), pool.gpu(timeout=20):
            pass
        with pool.gpu(timeout=20):
            pass  # once
        assert {each.scope for each in pool.status().endpoints} == {"container"}


def test_doctor_names_private_locks(private, monkeypatch, tmp_path, capsys):
    """With the line that mounts the host's directory."""
    monkeypatch.setenv("GPU_POOL_LOCK_DIR", str(tmp_path / "private"))
    main(["doctor", "--json"])
    (finding,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if "container" in each["what"]]
    assert finding["level"] == "warning"
    assert f"-v {tmp_path}/private:{tmp_path}/private" in finding["do"]


@pytest.mark.real
def test_the_same_path_is_not_the_same_directory(monkeypatch, tmp_path):
    """In a container the path of the server's locks leads elsewhere: then the server is asked, else the kernel."""
    monkeypatch.delenv("GPU_POOL_LOCK_DIR")
    with FakeFleet([1]) as fleet:
        path = fleet[0].lock_dir
        here = Endpoint(fleet[0].url, name="here", local=True)

        def arbiter():
            with GPUPool([here], poll_interval=0.1) as pool, pool.gpu(timeout=20):
                return pool.status().endpoints[0].arbiter

        monkeypatch.setenv("GPU_POOL_LOCK_DIR", path)
        assert arbiter() == f"host:{path}"
        monkeypatch.setattr(host, "_stores", {})
        os.rename(path, tmp_path / "real")
        try:
            assert arbiter().startswith("server ")
            monkeypatch.setattr(host, "_stores", {})
            monkeypatch.setenv("GPU_POOL_LOCK_DIR", str(tmp_path / "real"))
            assert arbiter() == f"host:{tmp_path}/real", "nor does another path make it another directory"
        finally:
            shutil.rmtree(path, ignore_errors=True)  # that of the pool that found none
            os.rename(tmp_path / "real", path)


# -- a real mount namespace ----------------------------------------------------------------------------------------

#: A root of its own over this machine's, as a container has it. $1: where to work; $2: what to mount; the rest is run.
CONTAINER = """
set -e
here=$1; locks=$2; shift 2
mount -t tmpfs upper "$here"
mkdir "$here/upper" "$here/work" "$here/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$here/upper,workdir=$here/work" "$here/root"
cd "$here/root"
touch .dockerenv
mount --rbind /proc proc
mount --rbind /dev dev
if [ -n "$locks" ]; then mkdir -p "./$locks"; mount --bind "$locks" "./$locks"; fi
exec chroot . "$@"
"""

ASK = """
import json, sys
from gpupool_sync.leases.host import HostStore
store = HostStore(sys.argv[1])
print(json.dumps({"scope": store.scope, "private": store.private, "id": store.directory_id}))
"""


@pytest.fixture
def contain(tmp_path):
    """Runs a command in something like a container; skips where that cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a mount namespace")
    number = iter(range(100))

    def run(*command, locks="", **options):
        here = tmp_path / f"container-{next(number)}"
        here.mkdir()
        start = ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONTAINER, "sh", str(here), str(locks)]
        return subprocess.run(
            [*start, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
            env={**os.environ, "PYTHONPATH": PATH},
            **options,
        )

    try:
        probe = run(sys.executable, "-c", "import gpupool_sync.pool, attrs")
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if probe.returncode != 0:
        pytest.skip(f"no container-like namespace can be made here: {probe.stderr.strip()[-200:]}")
    return run


@pytest.mark.real
@pytest.mark.root_only
def test_a_real_root_of_its_own(contain, tmp_path):
    """On an overlay root the locks are the container's own; bind-mounted they are the host's."""
    locks = tmp_path / "locks"
    outside = HostStore(str(locks))
    assert (outside.scope, outside.private) == ("host", None)

    alone = json.loads(contain(sys.executable, "-c", ASK, "/gpupool-locks").stdout)
    assert alone["scope"] == "container"
    assert "own root file system (overlay)" in alone["private"]
    assert not os.path.exists("/gpupool-locks")

    shared = json.loads(contain(sys.executable, "-c", ASK, str(locks), locks=locks).stdout)
    assert shared == {"scope": "host", "private": None, "id": outside.directory_id}
    outside.close()


#: A machine with a tmpfs of its own below the lock directory, and what `service` makes of it. Its arguments: that
#: directory, the tmpfs' propagation, where to work, the script that makes a container, and what to run in it.
MACHINE = """
import json, os, subprocess, sys
import yaml
parent, kind, here, container, *command = sys.argv[1:]
locks = f"{parent}/gpupool_sync"
subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "locks", parent], check=True)
subprocess.run(["mount", f"--make-{kind}", parent], check=True)
service = [sys.executable, "-m", "gpupool_sync", "service", "--format", "compose"]
text = subprocess.run(
    service, env={**os.environ, "GPU_POOL_LOCK_DIR": locks}, stdout=subprocess.PIPE, check=True, text=True
).stdout
volume = yaml.safe_load(text)["services"]["gpupool-sync"]["volumes"][0]
assert volume["source"] == volume["target"]
if volume["source"] == locks:
    os.umask(0)
    os.mkdir(locks, 0o1777)  # as tmpfiles.d does, as it says
how = volume["bind"].get("propagation", "rprivate").removeprefix("r")
start = ["unshare", "--mount", "--propagation", how, "sh", "-c", container, "sh", here, volume["source"]]
done = subprocess.run([*start, *command, locks], stdout=subprocess.PIPE, text=True, check=True)
found = os.stat(locks)
print(json.dumps({
    "mounted": os.path.relpath(volume["source"], parent),
    "inside": json.loads(done.stdout),
    "mode": oct(found.st_mode & 0o7777),
    "id": f"{found.st_dev}:{found.st_ino}",
}))
"""


@pytest.mark.real
@pytest.mark.root_only
@pytest.mark.parametrize(("kind", "mounted"), [("shared", "."), ("private", "gpupool_sync")])
def test_a_file_for_compose_gives_a_container_the_locks(contain, tmp_path, kind, mounted):
    """After a boot too, when nobody has made the directory yet: then the server does, for everybody."""
    (tmp_path / "lock").mkdir()
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", MACHINE, str(tmp_path / "lock"), kind, str(tmp_path / "here"), CONTAINER]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *command, sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, "PYTHONPATH": PATH},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["inside"] == {"scope": "host", "private": None, "id": found["id"]}
    assert (found["mounted"], found["mode"]) == (mounted, "0o1777")


@pytest.mark.real
@pytest.mark.root_only
@pytest.mark.parametrize("how", ["private", "named", "ok", "mounted"])
def test_serve_in_a_real_root_of_its_own(contain, tmp_path, how):
    """It says so and serves statistics only; or ends, if the directory was named; or is told that it is right."""
    locks = tmp_path / "locks"
    locks.mkdir()
    code = (
        "import sys, threading, signal, os\n"
        "from gpupool_sync.cli import main\n"
        "from gpupool_sync.server import run\n"
        "say = run._announcement\n"
        "def announcement(*arguments):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    return say(*arguments)\n"
        "run._announcement = announcement\n"
        "sys.exit(main(['serve', '--port', '0', '--json', *sys.argv[1:]]))\n"
    )
    options = {"private": [], "named": ["--lock-dir", "/gpupool-locks"], "ok": ["--container-ok"], "mounted": []}[how]
    mounted = locks if how == "mounted" else ""
    variable = {"private": "/gpupool-locks", "ok": "/gpupool-locks", "mounted": str(locks)}.get(how)
    prefix = [] if variable is None else ["env", f"GPU_POOL_LOCK_DIR={variable}"]
    done = contain(*prefix, sys.executable, "-c", code, *options, locks=mounted)
    if how == "named":
        assert done.returncode == 1
        assert "--container-ok" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["leases"] is (how != "private")
    assert ("--container-ok" in done.stderr) is (how == "private")
