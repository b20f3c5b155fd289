"""How much memory this process may still take: what the host has left, and what its control groups allow.

The kernel does not refuse shared memory that is not there; it kills a process for it later. So one has to ask first.
"""

from pathlib import Path


def available_memory(root: Path = Path("/")) -> dict[str, int]:
    """Bytes left, for each limit that this process stands under; processes that name the same limit share it.

    Counts memory of the file cache as free, since the kernel gives it back, and swap not at all. `root` is where
    /proc and /sys are.
    """
    found = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found["the host's MemAvailable"] = int(value.split()[0]) * 1024
    for folder in _control_groups(root):
        left = _left(folder)
        if left is not None:
            # In containers different groups may have one path, but never one inode.
            found[f"control group {folder} (inode {folder.stat().st_ino})"] = left
    return found


def _control_groups(root: Path) -> list[Path]:
    """Folders of this process's memory control groups, the innermost first, of version 1 and 2."""
    folders = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            # A container may see a path of the host's below a mount that begins at its own group.
            inner = mount / path.lstrip("/")
            if ".." in inner.parts or not inner.is_dir():
                inner = mount
            folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))]
    return folders


def _left(folder: Path) -> int | None:
    """Bytes that a control group still allows; None if it sets no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        try:
            most = (folder / limit).read_text().strip()
            if most == "max":
                return None
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # the root of version 2 has no such files
            continue
        return max(0, int(most) - used + sum(int(stat.get(name, 0)) for name in cache))
    return None
