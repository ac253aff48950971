"""What file system a directory is on, and whether the rest of the machine sees the same one.

Read from ``/proc``, by the open directory: a path can be covered by a later mount.  *root* and *environ* are given by
tests only.  On systems without ``/proc`` everything here is unknown.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping

import attrs

#: What the variable `container` says in one. (On WSL too, which shares its directories like any machine.)
_KINDS = frozenset({"docker", "podman", "oci", "lxc", "lxc-libvirt", "systemd-nspawn", "rkt", "crio", "flatpak"})
#: Control groups of a process in a container (also as it is seen from the host).
_CGROUPS = re.compile(r"/docker[/-][0-9a-f]{12}|/kubepods|/libpod-|/lxc/|/lxc\.payload|/crio-|/cri-containerd-")
#: Where container runtimes keep what they mount over the files below, and over "/".
_RUNTIMES = re.compile(r"/docker/|/containerd/|/kubelet/|/containers/storage/|/overlay-containers/|/lxc/|/machines/")
_BY_RUNTIMES = ("/", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
#: Directories on the host's disk that are mounted into one container, or one service, only.
_OF_ONE = {
    "systemd-private-": "a directory of this service alone (PrivateTmp= of systemd)",
    "kubernetes.io~empty-dir": "an emptyDir, which only the containers of this pod see",
}
_ANONYMOUS_VOLUME = re.compile(r"/volumes/[0-9a-f]{64}/_data(/|$)")


@attrs.frozen
class Mount:
    """One line of ``mountinfo``."""

    id: int
    device: str  # "major:minor"
    root: str  # what of its file system is mounted
    point: str  # where
    kind: str  # of file system
    source: str
    options: str  # of the file system
    is_slave: bool  # it follows the mounts of another mount namespace
    is_shared: bool  # others may follow it

    @property
    def is_in_memory(self) -> bool:
        """Whether it is empty after a boot."""
        return self.kind in ("tmpfs", "ramfs")

    @property
    def is_whole_tmpfs(self) -> bool:
        """Whether somebody may have made it for this very place: of others only a part is mounted."""
        return self.is_in_memory and self.root == "/"


def mount_of(fd: int, root: str = "/") -> Mount | None:
    """The mount that the open file is on; None if that cannot be found out."""
    mounts = _mounts(root)
    with contextlib.suppress(OSError, ValueError, StopIteration), open(_at(root, f"proc/self/fdinfo/{fd}")) as file:
        number = next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))
        for mount in mounts:
            if mount.id == number:
                return mount
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount for mount in reversed(mounts) if mount.device == wanted), None)


def container(root: str = "/", environ: Mapping[str, str] = os.environ) -> str | None:
    """What kind of container this process is in, with the sign of it: "Docker (/.dockerenv)"; None: in none."""
    if environ.get("container") in _KINDS:
        return f"{environ['container']} (the variable container)"
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes (the variable KUBERNETES_SERVICE_HOST)"
    mounts = {mount.point: mount for mount in _mounts(root)}
    top = mounts.get("/")
    # An image that was unpacked onto the disk of a (virtual) machine brings its marks with it, but it is none.
    on_disk = top is not None and top.root == "/" and top.source.startswith("/dev/")
    for mark, kind in (
        ("run/.containerenv", "Podman"),
        ("run/systemd/container", "a container"),
        ("run/secrets/kubernetes.io", "Kubernetes"),
        ("var/run/secrets/kubernetes.io", "Kubernetes"),
        (".dockerenv", "Docker"),
        (".singularity.d", "Apptainer"),
    ):
        if not on_disk and os.path.exists(_at(root, mark)):
            return f"{kind} (/{mark})"
    for name in ("self", "1"):
        with contextlib.suppress(OSError), open(_at(root, f"proc/{name}/cgroup")) as file:
            if _CGROUPS.search(file.read(65536)):
                return f"a container (/proc/{name}/cgroup)"
    for point in _BY_RUNTIMES:
        mount = mounts.get(point)
        if mount is not None and _RUNTIMES.search(f"{mount.root} {mount.options}"):
            return f"a container (what is mounted at {point})"
    return None


def why_private(fd: int, path: str, root: str = "/", environ: Mapping[str, str] = os.environ) -> str | None:
    """
    Why the rest of the machine does not see the open directory *path*; None: as far as can be told, it does.

    True of a directory in a container that is not mounted from the host.  In doubt a container's own: leases that
    exclude fewer than they say would give two holders one card.
    """
    mount = mount_of(fd, root)
    if mount is not None:
        for part, what in _OF_ONE.items():
            if part in mount.root:
                return f"{path} is in {what}"
    kind = container(root, environ)
    if kind is None:
        return None
    here = f"this is a container, {kind}, and {path} is"
    if mount is None:
        return f"{here} not known to be mounted from the host"
    if mount.point == "/":
        return f"{here} on its own root file system ({mount.kind})"
    if _ANONYMOUS_VOLUME.search(mount.root):
        return f"{here} on a volume that was made for it"
    # A tmpfs that is mounted whole is mostly one that the runtime made (--tmpfs, /run, /dev/shm). The host's own is
    # a slave if it came with the tree above it, and nobody makes one for this very directory.
    is_new = mount.is_whole_tmpfs and not mount.is_slave
    if is_new and mount.point != os.path.realpath(path):
        return f"{here} on a {mount.kind} at {mount.point} that seems to be its own"
    return None


def bind_propagation(fd: int, path: str, root: str = "/") -> str | None:
    """
    How a bind mount of the open directory *path* has to propagate, so that `why_private` takes what is in it for the
    machine's within a container; None: in no way, as there is nobody to be a slave of.
    """
    mount = mount_of(fd, root)
    if mount is None or not mount.is_whole_tmpfs or mount.point != os.path.realpath(path):
        return "rprivate"
    return "rslave" if mount.is_shared or mount.is_slave else None


def _at(root: str, name: str) -> str:
    return os.path.join(root, name)


def _mounts(root: str) -> list[Mount]:
    """All mounts of this mount namespace; a later one covers an earlier one of the same place."""
    found: list[Mount] = []
    with contextlib.suppress(OSError), open(_at(root, "proc/self/mountinfo"), errors="surrogateescape") as file:
        for line in file:
            # Six fields, optional fields, a hyphen, three fields.
            fields = line.split()
            with contextlib.suppress(ValueError, IndexError):
                end = fields.index("-", 6)
                found.append(
                    Mount(
                        id=int(fields[0]),
                        device=fields[2],
                        root=_unescaped(fields[3]),
                        point=_unescaped(fields[4]),
                        kind=fields[end + 1],
                        source=_unescaped(fields[end + 2]) if len(fields) > end + 2 else "",
                        options=fields[end + 3] if len(fields) > end + 3 else "",
                        is_slave=any(field.startswith("master:") for field in fields[6:end]),
                        is_shared=any(field.startswith("shared:") for field in fields[6:end]),
                    )
                )
    return found


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
