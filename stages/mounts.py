"""Which file system a folder lies on, as Linux's table of mounts tells: some are other machines' disks, where rules differ."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
UNKNOWN = "unknown"
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p", "orangefs", "pvfs2", "wekafs", "panfs", "davfs", "ocfs2",
    "gfs2", "virtiofs",
}  # fmt: skip
LOCAL_FUSE = {"fuse-overlayfs", "overlayfs", "mergerfs", "bindfs", "encfs", "gocryptfs", "ntfs-3g", "lxcfs", "unionfs"}  # any other `fuse.NAME` is taken for a network's


def file_system(folder: Path, mounts: Path = MOUNTS) -> str:
    """Type of the file system a folder is on, such as ext4 or nfs4; "unknown" where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return UNKNOWN
    here, best, kind = os.path.realpath(folder), -1, UNKNOWN
    for line in lines:
        _, point, name, *_ = line.split(" ")
        point = point.encode("latin-1", "backslashreplace").decode("unicode_escape")  # a blank is \040
        if (here == point or here.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, kind = len(point), name  # of two mounts at one place the later one is seen
    return kind


def is_network(kind: str) -> bool:
    """Whether a type of file system is a network's."""
    return kind in NETWORK or (kind.startswith("fuse.") and kind.removeprefix("fuse.") not in LOCAL_FUSE)


def on_network(path: Path) -> bool:
    """Whether a path lies on a network file system, as far as the table of mounts tells."""
    return is_network(file_system(path))
