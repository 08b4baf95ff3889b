"""What `kvbm doctor` looks at on the daemon's machine: socket, SSD, memory."""

from __future__ import annotations

import os
import pwd
import resource
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvbm.cli.findings import Finding, Place, ok, problem, warning
from kvbm.cli.output import size

FREE_BYTES_MIN: Final = 64 << 20  # below it the catalogue may not grow
FREE_BYTES_WANTED: Final = 1 << 30


def check_machine(place: Place) -> Iterator[Finding]:
    """Findings on this machine; nothing is changed but for a file made and removed at once."""
    if place.is_running:
        yield _socket(place)
    if place.ssd_path is not None:
        yield _free_space(place, place.ssd_path)
        yield _direct_io(place, place.ssd_path)
    yield _huge_pages(place)
    yield _locked_memory(place)


def _socket(place: Place) -> Finding:
    path = place.socket
    owner = _user_name(place.uid)
    try:
        found = path.lstat()
        folder = path.parent.stat()
    except PermissionError:
        return warning(
            "socket", f"{path} is out of sight for this user", f"engines must run as {owner}"
        )
    except OSError as error:
        return problem(
            "socket",
            f"{path}: {error.strerror}: engines cannot find the daemon",
            "restart the daemon; let nothing clean up its runtime directory",
        )
    mode = stat.S_IMODE(found.st_mode)
    says = f"{path}, of {_user_name(found.st_uid)}, mode {mode:04o}"
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != place.uid:
        return problem("socket", f"{says}: not the daemon's", f"remove {path}, restart the daemon")
    if mode & 0o077 and folder.st_mode & 0o007:
        return warning("socket", f"{says}: others can connect", f"chmod 600 {path}")
    if place.uid != os.getuid():
        return ok("socket", f"{says}; engines must run as {owner}")
    return ok("socket", says)


def _free_space(place: Place, path: Path) -> Finding:
    try:
        found = os.statvfs(next(p for p in (path, *path.parents) if p.exists()))
    except OSError as error:
        return warning("ssd space", f"{path}: {error.strerror}", "run as the daemon's user")
    free = found.f_bavail * found.f_frsize
    says = f"{size(free)} free on the filesystem of {path}"
    if not place.is_running:
        missing = place.ssd_bytes - _reserved(path / "extents")
        if missing > free:
            return problem(
                "ssd space",
                f"{says}, but ssd.capacity needs {size(missing)} more",
                "lower ssd.capacity or make room",
            )
    if free < FREE_BYTES_MIN:
        return problem("ssd space", f"{says}: its catalogue cannot grow", "make room")
    if free < FREE_BYTES_WANTED:
        return warning("ssd space", says, "keep a GiB free for the catalogue")
    return ok("ssd space", says)


def _direct_io(place: Place, path: Path) -> Finding:
    buffered = warning(
        "O_DIRECT",
        f"the filesystem of {path} does not take O_DIRECT: bytes go through the page cache",
        "put ssd.path on ext4 or XFS on a local disk",
    )
    if mover := place.movers.get("G3"):
        return buffered if mover.endswith("-buffered") else ok("O_DIRECT", f"in use by {mover}")
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".kvbm-doctor-") as file:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
    except FileNotFoundError:
        return warning("O_DIRECT", f"{path} does not exist yet", "start the daemon, which makes it")
    except PermissionError:
        return warning("O_DIRECT", f"{path} is not this user's", "run as the daemon's user")
    except OSError:
        return buffered
    return ok("O_DIRECT", f"taken by the filesystem of {path}")


def _huge_pages(place: Place) -> Finding:
    if not place.huge_pages:
        return ok("huge pages", "not asked for (dram.huge_pages: false)")
    found = _meminfo()
    have = found.get("HugePages_Total", 0) * found.get("Hugepagesize", 0) * 1024
    says = f"{size(have)} reserved, dram.capacity is {size(place.host_memory_bytes)}"
    if have < place.host_memory_bytes:
        return problem("huge pages", says, "raise vm.nr_hugepages (sysctl)")
    return ok("huge pages", says)


def _locked_memory(place: Place) -> Finding:
    limit = _locked_limit(place.pid)
    if limit is None:
        return warning("memlock", "the daemon's limit cannot be read", "run as the daemon's user")
    whose = "the daemon" if place.pid is not None else "this user"
    if limit == resource.RLIM_INFINITY or limit >= place.host_memory_bytes:
        shown = "everything" if limit == resource.RLIM_INFINITY else size(limit)
        return ok("memlock", f"{whose} may lock {shown}")
    return warning(
        "memlock",
        f"{whose} may lock {size(limit)} of {size(place.host_memory_bytes)}: GPUs and RDMA need "
        "host memory locked",
        "LimitMEMLOCK=infinity in the unit (kvbm-daemon print-unit has it), for engines too",
    )


def _locked_limit(pid: int | None) -> int | None:
    if pid is None:
        return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return resource.RLIM_INFINITY if soft == "unlimited" else int(soft)
    return None


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def _reserved(extents: Path) -> int:
    try:
        return extents.stat().st_blocks * 512
    except OSError:
        return 0


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
