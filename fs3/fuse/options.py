"""How to mount: the options, in Python and as `mount -o` writes them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fs3.core.config import LOG_LEVELS, TRANSPORTS, RdmaOptions
from fs3.core.errors import Fs3Error, error
from fs3.core.units import parse_bytes
from fs3.v1.frame_pb2 import Code

MEMORY_BYTES_MIN = 16 << 20
ENGINES = ("native", "fusepy")
# Options that the fusepy engine has; it refuses all others rather than leave them out.
_FUSEPY_OPTIONS = frozenset(
    {
        "engine", "allow_other", "default_permissions", "read_only", "suid", "dev", "exec", "cache", "threads",
        "max_memory_bytes", "attr_timeout_s", "entry_timeout_s", "readahead_bytes", "noatime", "local_locks",
        "op_timeout_s", "transport", "rdma", "shared_memory", "cluster_id", "token_file", "log_file",
        "pid_file", "log_level",
    }
)  # fmt: skip
CACHES = ("auto", "strict", "none")
ID_MAX = 2**32 - 2  # the one above means "no id"

# What `mount -o` calls some of them, and options of mount(8) that mean nothing here.
_ALIASES = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "nosuid": ("suid", False),
    "nodev": ("dev", False),
    "noexec": ("exec", False),
    "atime": ("noatime", False),
    "relatime": ("noatime", False),
    "locallocks": ("local_locks", True),
    "nolock": ("local_locks", True),
}
_FSTAB = frozenset({"defaults", "noauto", "auto", "nofail", "_netdev", "user", "users", "nouser", "owner", "group"})
_IGNORED = _FSTAB | {"async", "diratime", "nodiratime", "silent", "loud", "comment", "uhelper"}
_RENAMED = {"max_memory": "max_memory_bytes"}
# May be given several times.
_LISTS = frozenset({"uidmap", "gidmap"})


def _invalid(message: str) -> Fs3Error:
    return error(Code.CODE_INVALID_ARGUMENT, message)


@dataclass(frozen=True, kw_only=True)
class MountOptions:
    """Options of a mount. The defaults are right for one user's mount."""

    allow_other: bool = False
    """Let other users than the one that mounts use the mount."""
    default_permissions: bool = True
    """Let the kernel check permission bits, as on a local file system."""
    read_only: bool = False
    suid: bool = False
    """Honour set-id bits of programs; only root may ask for it."""
    dev: bool = False
    """Honour device nodes; only root may ask for it."""
    exec: bool = True
    """Let programs on the mount be run."""
    subdir: str = ""
    """The directory of the cluster that the mount shows; empty: all of it."""
    cache: str = "auto"
    """What is kept in memory of files: auto (checked at each open), strict (before each use), none."""
    uid: int | None = None
    """Everything is shown as this user's, and done as this user."""
    gid: int | None = None
    """Everything is shown as this group's, and done as this group."""
    uidmap: str = ""
    """LOCAL:CLUSTER:COUNT, several with / between: which users here are which of the cluster; others are 65534."""
    gidmap: str = ""
    """As uidmap, for groups."""
    threads: int = 0
    """Threads that take requests from the kernel; 0: by the number of cores."""
    max_memory_bytes: int = 256 << 20
    """Memory for data on its way, both directions together."""
    attr_timeout_s: float = 1.0
    """How long the kernel may use attributes without asking."""
    entry_timeout_s: float = 1.0
    """How long the kernel may use the inode behind a name without asking."""
    readahead_bytes: int = 4 << 20
    """What the kernel reads ahead of a sequential reader (only root can raise it)."""
    noatime: bool = False
    """Reading never changes access times; else the first read after a change does, and one a day (relatime)."""
    local_locks: bool = False
    """Locks of files (flock, fcntl) hold within this mount only, and cost nothing."""
    op_timeout_s: float = 30.0
    """How long one operation may take, retries included, before it fails."""
    transport: str = "auto"
    """How storage is reached: auto (RDMA where both ends have it, else TCP), tcp or rdma."""
    rdma: RdmaOptions = field(default_factory=RdmaOptions)
    """How RDMA is used."""
    shared_memory: bool = True
    """Payloads to and from storage services of this host go through shared memory, unless transport is rdma."""
    cluster_id: str = ""
    """Refuse any other cluster; empty: take the one that answers."""
    token_file: str = ""
    """File with the cluster's token."""
    metrics: str = ""
    """HOST:PORT where counters are served over HTTP, for Prometheus; empty: nowhere."""
    log_file: str = ""
    """Where the daemon writes its log; empty: beside the pid file."""
    pid_file: str = ""
    """Empty: chosen by the mountpoint, so that `umount` finds it."""
    log_level: str = "info"
    engine: str = "native"
    """Who serves the mount: native, or fusepy (Python threads, for machines where the native one cannot run)."""

    def __post_init__(self) -> None:
        if self.threads < 0 or self.threads > 256:
            raise _invalid(f"threads must be in 0..256, not {self.threads}")
        if self.max_memory_bytes < MEMORY_BYTES_MIN:
            raise _invalid(f"max_memory_bytes must be at least 16MiB, not {self.max_memory_bytes}")
        if self.readahead_bytes < 0:
            raise _invalid(f"readahead_bytes must not be negative, not {self.readahead_bytes}")
        if self.log_level not in LOG_LEVELS:
            raise _invalid(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        if self.transport not in TRANSPORTS:
            raise _invalid(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        for name in ("attr_timeout_s", "entry_timeout_s", "op_timeout_s"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "op_timeout_s" and value == 0):
                raise _invalid(f"{name} must be a number of seconds, not {value}")
        if self.cache not in CACHES:
            raise _invalid(f"cache must be one of {', '.join(CACHES)}, not {self.cache!r}")
        if self.cache != "auto":
            object.__setattr__(self, "attr_timeout_s", 0.0)
            object.__setattr__(self, "entry_timeout_s", 0.0)
        if ".." in self.subdir.split("/"):
            raise _invalid(f"subdir must not lead through '..': {self.subdir!r}")
        self._check_ids()
        if self.metrics:
            parse_address(self.metrics)
        if self.engine not in ENGINES:
            raise _invalid(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.engine == "fusepy":
            self._check_fusepy()

    def _check_ids(self) -> None:
        for name in ("uid", "gid"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= ID_MAX:
                raise _invalid(f"{name} must be in 0..{ID_MAX}, not {value}")
            if parse_id_map(getattr(self, name + "map")) and value is not None:
                raise _invalid(f"{name} and {name}map exclude each other")

    def _check_fusepy(self) -> None:
        for option in dataclasses.fields(self):
            factory = option.default_factory
            default = option.default if factory is dataclasses.MISSING else factory()
            if option.name not in _FUSEPY_OPTIONS and getattr(self, option.name) != default:
                raise _invalid(f"the fusepy engine has no option {option.name}: leave it out, or use --engine native")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> MountOptions:
        """Options by name. Raises INVALID_ARGUMENT for an unknown name, with the nearest valid one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                close = difflib.get_close_matches(key, [*names, *_ALIASES], n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
                raise _invalid(f"unknown mount option {key!r}{hint}")
        return cls(**values)


def parse_id_map(text: str) -> list[tuple[int, int, int]]:
    """Parse "1000:0:1/2000:500:10": triples of local id, id of the cluster, count. Raises INVALID_ARGUMENT."""
    ranges = []
    for part in filter(None, text.split("/")):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() for n in numbers):
            raise _invalid(f"{part!r} maps no ids: write LOCAL:CLUSTER:COUNT, for example 1000:0:1")
        local, cluster, count = map(int, numbers)
        if count == 0 or max(local, cluster) + count - 1 > ID_MAX:
            raise _invalid(f"{part!r} maps no ids: they are in 0..{ID_MAX}, and the count is at least 1")
        ranges.append((local, cluster, count))
    return ranges


def parse_address(text: str) -> tuple[str, int]:
    """Parse "HOST:PORT"; an IPv6 address is in brackets. Raises INVALID_ARGUMENT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise _invalid(f"{text!r} is not HOST:PORT; write for example metrics=127.0.0.1:9100")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _value(name: str, text: str | None, kind: str) -> Any:
    if kind == "bool":
        if text is None or text in ("1", "true", "yes", "on"):
            return True
        if text in ("0", "false", "no", "off"):
            return False
        raise _invalid(f"mount option {name} is a switch: write {name} or {name}=0, not {name}={text}")
    if text is None or text == "":
        raise _invalid(f"mount option {name} needs a value: {name}=...")
    if kind == "RdmaOptions":
        raise _invalid(f"{name} is no option of -o: write --rdma key=value, for example --rdma devices=mlx5_0")
    if name.endswith("_bytes"):
        return parse_bytes(text)
    try:
        return {"int": int, "int | None": int, "float": float, "str": str}[kind](text)
    except ValueError:
        raise _invalid(f"mount option {name} is a number, not {text!r}") from None


def parse_options(text: str, *, base: MountOptions | None = None, **given: Any) -> MountOptions:
    """Parse what follows `-o`, such as "ro,allow_other,threads=4"; `given` options win over it, those of `base` do not.

    Raises INVALID_ARGUMENT naming the option.
    """
    kinds = {f.name: str(f.type) for f in dataclasses.fields(MountOptions)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if name.startswith(("x-", "X-")):
            continue  # for other programs, such as systemd
        name = name.replace("-", "_")
        name = _RENAMED.get(name, name)
        if name in _IGNORED:
            continue
        if name == "metrics_port":
            name, value = "metrics", f"127.0.0.1:{value}"
        if name in _ALIASES and not equals:
            key, switch = _ALIASES[name]
            values[key] = switch
        elif name in kinds:
            parsed = _value(name, value if equals else None, kinds[name])
            values[name] = f"{values[name]}/{parsed}" if name in _LISTS and name in values else parsed
        else:
            values[name] = value
    return MountOptions.from_mapping({**(vars(base) if base else {}), **values, **given})
