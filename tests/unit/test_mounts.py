"""Which file system a folder is on, by the table of mounts, and which of them are other machines' disks."""

from __future__ import annotations

from stages import mounts


def test_the_innermost_mount_tells_and_blanks_and_letters_are_read_as_they_are(tmp_path):
    table = tmp_path / "mounts"
    table.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/my\\040nfs nfs4 rw 0 0\n/dev/b {tmp_path}/my\\040nfs/loc\u00e4l\u20ac xfs rw 0 0\n", encoding="utf-8")
    names = ("my nfs/registry", "my nfs-2", "my nfs", "my nfs/loc\u00e4l\u20ac/x", "my nfs/loc\u00e4l", ".")
    assert [mounts.file_system(tmp_path / name, table) for name in names] == ["nfs4", "ext4", "nfs4", "xfs", "nfs4", "ext4"]
    assert mounts.file_system(tmp_path, tmp_path / "none") == mounts.UNKNOWN


def test_of_two_mounts_at_one_place_the_later_one_is_seen(tmp_path):
    (tmp_path / "mounts").write_text("rootfs / rootfs rw 0 0\n/dev/a / ext4 rw 0 0\n")
    assert mounts.file_system(tmp_path, tmp_path / "mounts") == "ext4"


def test_what_fuse_shows_is_a_networks_unless_it_is_known_to_be_local():
    kinds = ["nfs4", "lustre", "fuse.sshfs", "fuse.somebodys", "fuse.fuse-overlayfs", "fuseblk", "ext4", "tmpfs", mounts.UNKNOWN]
    assert [kind for kind in kinds if mounts.is_network(kind)] == ["nfs4", "lustre", "fuse.sshfs", "fuse.somebodys"]
