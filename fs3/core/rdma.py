"""What this machine has for RDMA, whether fs3 can use it, and what to do where it cannot.

Devices are read from sysfs, which needs no library. libibverbs says which of them it has a provider for and may open,
and pyverbs, where it is installed, what their limits are.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final

LIBRARY: Final = "libibverbs.so.1"
CM_LIBRARY: Final = "librdmacm.so.1"
"""The connection manager, which iWARP needs."""
# Below the first a service has no room for the buffers of its connections, below the second little for others.
LOCKED_BYTES_NEEDED: Final = 64 << 20
LOCKED_BYTES_WANTED: Final = 1 << 30
CAP_IPC_LOCK: Final = 14
# What RoCE puts around the data of a packet at most; the kernel subtracts it from the MTU of the net device.
ROCE_OVERHEAD_BYTES: Final = 96
PATH_MTU_BYTES: Final = (4096, 2048, 1024, 512, 256)
LIMITS: Final = (
    "max_qp",
    "max_qp_wr",
    "max_sge",
    "max_cq",
    "max_cqe",
    "max_mr",
    "max_mr_size",
    "max_pd",
    "max_srq",
    "max_srq_wr",
    "max_qp_rd_atom",
)
# Counters that grow only when something is wrong with a link, a peer or the congestion control of the network.
ERROR_COUNTERS: Final = {
    "symbol_error", "link_error_recovery", "link_downed", "port_rcv_errors", "port_rcv_remote_physical_errors",
    "port_xmit_discards", "port_rcv_constraint_errors", "port_xmit_constraint_errors",
    "local_link_integrity_errors", "excessive_buffer_overrun_errors", "VL15_dropped", "out_of_sequence",
    "out_of_buffer", "packet_seq_err", "local_ack_timeout_err", "rnr_nak_retry_err", "implied_nak_seq_err",
    "rx_icrc_encapsulated", "req_cqe_error", "resp_cqe_error", "req_remote_access_errors",
    "resp_remote_access_errors", "out_of_seq_request", "rcvd_seq_err", "rcvd_rnr_err", "send_rnr_err", "send_err",
    "completer_retry_err", "retry_exceeded_err", "retry_rnr_exceeded_err",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way, and what to do about it. Unless `fatal`, RDMA works in spite of it."""

    what: str
    advice: str
    fatal: bool = True


@dataclass(frozen=True)
class Gid:
    """An address of a port. `type` is "RoCE v1", "RoCE v2", "InfiniBand" or "iWARP"."""

    index: int
    address: str
    type: str
    net_device: str | None


@dataclass(frozen=True)
class Port:
    """A port of a device."""

    number: int
    state: str
    physical_state: str
    link_layer: str
    rate: str
    lid: int
    mtu_bytes: int | None
    """Of the path; for iWARP of the net device. None where nobody says."""
    gids: tuple[Gid, ...]
    chosen_gid: Gid | None
    chosen_because: str
    errors: Mapping[str, int]
    """Those of ERROR_COUNTERS that are not zero."""
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether connections can be made over it."""
        return not any(p.fatal for p in self.problems)


@dataclass(frozen=True)
class Device:
    """An RDMA device."""

    name: str
    driver: str
    firmware: str
    numa_node: int | None
    uverbs: str | None
    """The character device by which programs reach it."""
    limits: Mapping[str, int]
    """Empty without pyverbs."""
    takes_dmabufs: bool | None
    """Whether memory of GPUs can be registered; None where the device cannot be opened."""
    ports: tuple[Port, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether connections can be made over one of its ports."""
        return not any(p.fatal for p in self.problems) and any(p.usable for p in self.ports)


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    library: str | None
    """None when libibverbs cannot be loaded."""
    locked_bytes_max: int | None
    """How much memory this process may lock; None: all."""
    devices: tuple[Device, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether fs3 can speak RDMA on this machine."""
        return not any(p.fatal for p in self.problems) and any(d.usable for d in self.devices)


@dataclass(frozen=True)
class Verbs:
    """What the libraries say of the devices, by their names."""

    library: str | None = None
    cm_library: str | None = None
    opened: Mapping[str, int] = field(default_factory=dict)
    """0, or the errno of opening it. A device that is missing here has no provider."""
    limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    mtu_bytes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """By device and port number."""
    dmabufs: Mapping[str, bool] = field(default_factory=dict)
    """Whether a device takes dma-bufs."""


def load_verbs() -> Verbs:
    """Ask libibverbs, and pyverbs where there is one."""
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError:
        return Verbs()
    library.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    library.ibv_get_device_name.restype = ctypes.c_char_p
    library.ibv_get_device_name.argtypes = [ctypes.c_void_p]
    library.ibv_open_device.restype = ctypes.c_void_p
    library.ibv_open_device.argtypes = [ctypes.c_void_p]
    library.ibv_close_device.argtypes = [ctypes.c_void_p]
    count = ctypes.c_int()
    devices = library.ibv_get_device_list(ctypes.byref(count))
    cm_library = CM_LIBRARY if _can_be_loaded(CM_LIBRARY) else None
    if not devices:
        return Verbs(LIBRARY, cm_library)
    opened, dmabufs = {}, {}
    for index in range(count.value):
        ctypes.set_errno(0)
        context = library.ibv_open_device(devices[index])
        status = 0 if context else ctypes.get_errno() or errno.EIO
        name = library.ibv_get_device_name(devices[index]).decode()
        opened[name] = status
        if context:
            dmabufs[name] = _takes_dmabufs(library, context)
            library.ibv_close_device(context)
    library.ibv_free_device_list(devices)
    limits: dict[str, dict[str, int]] = {}
    mtu_bytes: dict[tuple[str, int], int] = {}
    with suppress(ImportError):
        _ask_pyverbs([name for name, status in opened.items() if status == 0], limits, mtu_bytes)
    return Verbs(LIBRARY, cm_library, opened, limits, mtu_bytes, dmabufs)


def _takes_dmabufs(library: ctypes.CDLL, context: int) -> bool:
    """Ask with a descriptor that is none: only who could take a dma-buf says so. As NCCL asks."""
    if not hasattr(library, "ibv_reg_dmabuf_mr"):
        return False
    library.ibv_alloc_pd.restype = library.ibv_reg_dmabuf_mr.restype = ctypes.c_void_p
    library.ibv_alloc_pd.argtypes = library.ibv_dealloc_pd.argtypes = [ctypes.c_void_p]
    number = ctypes.c_uint64
    library.ibv_reg_dmabuf_mr.argtypes = [ctypes.c_void_p, number, ctypes.c_size_t, number, ctypes.c_int, ctypes.c_int]
    domain = library.ibv_alloc_pd(context)
    if not domain:
        return False
    region = library.ibv_reg_dmabuf_mr(domain, 0, 1, 0, -1, 0)
    why = ctypes.get_errno()
    library.ibv_dealloc_pd(domain)
    return not region and why not in (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOSYS)


def _can_be_loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _ask_pyverbs(
    names: Sequence[str], limits: dict[str, dict[str, int]], mtu_bytes: dict[tuple[str, int], int]
) -> None:
    module = importlib.import_module("pyverbs.device")
    failure = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
    for name in names:
        with suppress(failure), module.Context(name=name) as context:
            attributes = context.query_device()
            limits[name] = {key: int(getattr(attributes, key)) for key in LIMITS}
            for port in range(1, attributes.phys_port_cnt + 1):
                mtu_bytes[name, port] = 128 << int(context.query_port(port).active_mtu)


def inspect(
    root: Path = Path("/"), *, verbs: Callable[[], Verbs] = load_verbs, locked_bytes: int | None = None
) -> Report:
    """Look at everything. `root` has sys, dev and proc; `locked_bytes` stands for the limit of this process."""
    told = verbs()
    problems = []
    names = sorted(p.name for p in (root / "sys/class/infiniband").glob("*"))
    if not names:
        loaded = (root / "sys/class/infiniband").is_dir()
        problems.append(
            Problem(
                "the kernel has no RDMA device" + ("" if loaded else ", nor are its RDMA modules loaded"),
                "nothing, if TCP is meant to be used. With an RDMA adapter load its driver (for Mellanox: modprobe "
                "mlx5_ib), and in a virtual machine or a container see that it is passed in. For trials without one: "
                "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV",
            )
        )
    if told.library is None:
        problems.append(
            Problem(
                f"{LIBRARY} cannot be loaded",
                "install it and its providers: apt-get install libibverbs1 ibverbs-providers, or dnf install "
                "libibverbs; nothing has to be rebuilt",
            )
        )
    locked = _locked_bytes_max(root, locked_bytes)
    if locked is not None and locked < LOCKED_BYTES_WANTED:
        problems.append(
            Problem(
                f"this process may lock {locked >> 10} KiB of memory only",
                "raise it: LimitMEMLOCK=infinity in the systemd unit, `memlock unlimited` in "
                "/etc/security/limits.conf, --ulimit memlock=-1 for a container; or give CAP_IPC_LOCK",
                fatal=locked < LOCKED_BYTES_NEEDED,
            )
        )
    return Report(told.library, locked, tuple(_device(root, name, told) for name in names), tuple(problems))


def _read(path: Path) -> str:
    """Return what a file of sysfs says; empty where it is missing or has nothing to say."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    """0x1f, 31 or 31 with a unit; 0 for anything else."""
    try:
        return int(text.split()[0], 0)
    except (IndexError, ValueError):
        return 0


def _named(text: str) -> str:
    """Turn sysfs's "4: ACTIVE" into "ACTIVE"."""
    return text.partition(": ")[2] or text


def _locked_bytes_max(root: Path, limit: int | None) -> int | None:
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> CAP_IPC_LOCK & 1:
            return None
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _device(root: Path, name: str, verbs: Verbs) -> Device:
    path = root / "sys/class/infiniband" / name
    iwarp = _named(_read(path / "node_type")) == "RNIC"
    numa = _read(path / "device/numa_node")
    uverbs = next(
        (p.parent.name for p in (root / "sys/class/infiniband_verbs").glob("*/ibdev") if _read(p) == name), None
    )
    numbers = sorted(int(p.name) for p in (path / "ports").glob("*") if p.name.isdigit())
    link = path / "device/driver"
    return Device(
        name,
        driver=link.resolve().name if link.exists() else _read(path / "node_desc"),
        firmware=_read(path / "fw_ver"),
        numa_node=int(numa) if numa.isdigit() else None,
        uverbs=f"/dev/infiniband/{uverbs}" if uverbs else None,
        limits=verbs.limits.get(name, {}),
        takes_dmabufs=verbs.dmabufs.get(name),
        ports=tuple(_port(root, path, n, iwarp, verbs.mtu_bytes.get((name, n))) for n in numbers),
        problems=tuple(_device_problems(root, name, uverbs, iwarp, verbs)),
    )


def _device_problems(root: Path, name: str, uverbs: str | None, iwarp: bool, verbs: Verbs) -> Iterator[Problem]:
    if uverbs is None:
        yield Problem(f"{name} is not offered to programs", "load the module: modprobe ib_uverbs")
        return
    needed = [uverbs]
    if iwarp:
        needed.append("rdma_cm")
        if verbs.library and not verbs.cm_library:
            advice = "install it: apt-get install librdmacm1, or dnf install librdmacm"
            yield Problem(f"{name} speaks iWARP, and {CM_LIBRARY} cannot be loaded", advice)
    reachable = True
    for node in needed:
        path, shown = root / "dev/infiniband" / node, f"/dev/infiniband/{node}"
        if not path.exists():
            module = "rdma_ucm" if node == "rdma_cm" else "ib_uverbs"
            advice = (
                f"in a container give it the device (--device {shown}), elsewhere load the module: modprobe {module}"
            )
            yield Problem(f"{shown} is missing", advice)
        elif not os.access(path, os.R_OK | os.W_OK):
            advice = f"give this user access, by a udev rule or chmod 666 {shown}"
            yield Problem(f"{shown} may not be opened by this user", advice)
        else:
            continue
        reachable = False
    if not reachable or verbs.library is None:
        return
    status = verbs.opened.get(name)
    if status is None:
        advice = "install the providers: apt-get install ibverbs-providers, or dnf install libibverbs"
        yield Problem(f"{verbs.library} has no provider for {name}", advice)
    elif status != 0:
        advice = "a device cgroup or the rdma cgroup (rdma.max) may forbid it; dmesg may say more"
        yield Problem(f"{name} cannot be opened: {os.strerror(status)}", advice)
    for limit in _cgroup_limits(root, name):
        advice = "raise rdma.max of the cgroup, or write max: fs3 wants a handle per process and objects per connection"
        yield Problem(f"the cgroup limits {name} to {limit}", advice, fatal=False)


def _cgroup_limits(root: Path, name: str) -> Iterator[str]:
    """Yield the limits of the rdma controller for this process, of its cgroup and those above."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        if not line.startswith("0::/"):
            continue
        group = root / "sys/fs/cgroup" / line[4:]
        for directory in (group, *group.parents):
            for entry in _read(directory / "rdma.max").splitlines():
                device, *limits = entry.split()
                if device == name:
                    yield from (limit for limit in limits if not limit.endswith("=max"))


def _port(root: Path, device: Path, number: int, iwarp: bool, verbs_mtu_bytes: int | None) -> Port:
    path = device / "ports" / str(number)
    link_layer = _read(path / "link_layer")
    gids = tuple(_gids(path, link_layer, iwarp))
    chosen, because = choose_gid(gids)
    net_device = next((g.net_device for g in gids if g.net_device), None) or _read(device / "parent") or None
    net_mtu_bytes = _number(_read(root / "sys/class/net" / net_device / "mtu")) if net_device else 0
    mtu_bytes = verbs_mtu_bytes
    if iwarp:
        mtu_bytes = net_mtu_bytes or None
    elif mtu_bytes is None and net_mtu_bytes:
        mtu_bytes = next((m for m in PATH_MTU_BYTES if m + ROCE_OVERHEAD_BYTES <= net_mtu_bytes), None)
    port = Port(
        number,
        state=_named(_read(path / "state")),
        physical_state=_named(_read(path / "phys_state")),
        link_layer=link_layer,
        rate=_read(path / "rate"),
        lid=_number(_read(path / "lid")),
        mtu_bytes=mtu_bytes,
        gids=gids,
        chosen_gid=chosen,
        chosen_because=because,
        errors=dict(sorted(_errors(path))),
        problems=(),
    )
    return replace(port, problems=tuple(_port_problems(port, net_device, net_mtu_bytes)))


def _gids(port: Path, link_layer: str, iwarp: bool) -> Iterator[Gid]:
    for index in sorted(int(p.name) for p in (port / "gids").glob("*") if p.name.isdigit()):
        text = _read(port / "gids" / str(index))
        with suppress(ValueError):
            address = IPv6Address(text)
            if int(address) == 0:
                continue
            if iwarp:
                kind = "iWARP"
            elif link_layer == "InfiniBand":
                kind = "InfiniBand"
            else:
                kind = _read(port / "gid_attrs/types" / str(index)).removeprefix("IB/")
            mapped = address.ipv4_mapped
            shown = f"::ffff:{mapped}" if mapped else str(address)
            yield Gid(index, shown, kind, _read(port / "gid_attrs/ndevs" / str(index)) or None)


def choose_gid(gids: Sequence[Gid]) -> tuple[Gid | None, str]:
    """Choose the address that connections are made from, unless one is configured, and say why."""

    def rank(gid: Gid) -> tuple[int, str]:
        address = IPv6Address(gid.address)
        if gid.type == "InfiniBand":
            return 0, "the first one; InfiniBand needs no other"
        if gid.type == "iWARP":
            return 0, "iWARP connects by the IP addresses of the net device"
        if gid.type == "RoCE v2" and address.ipv4_mapped:
            return 1, "RoCE v2 of an IPv4 address can be routed"
        if gid.type == "RoCE v2" and not address.is_link_local:
            return 2, "RoCE v2 of an IPv6 address can be routed"
        if gid.type == "RoCE v2":
            return 3, "RoCE v2, but of a link-local address: within this network only"
        return 4, "there is no RoCE v2: within this Ethernet only"

    best = min(gids, key=lambda gid: (rank(gid)[0], gid.index), default=None)
    return (best, rank(best)[1]) if best else (None, "the port has no GID")


def _errors(port: Path) -> Iterator[tuple[str, int]]:
    for directory in ("counters", "hw_counters"):
        for path in (port / directory).glob("*"):
            if path.name in ERROR_COUNTERS and (count := _number(_read(path))):
                yield path.name, count


def _port_problems(port: Port, net_device: str | None, net_mtu_bytes: int) -> Iterator[Problem]:
    where = f"port {port.number}"
    infiniband = port.link_layer == "InfiniBand"
    if port.state != "ACTIVE":
        if infiniband and port.physical_state == "LinkUp":
            advice = (
                "its link is up, but no subnet manager has configured it: start one (opensm), or see to the switch's"
            )
        elif infiniband:
            advice = "look at the cable, and whether the port of the switch is enabled (ibstat, iblinkinfo)"
        else:
            advice = f"bring the net device up: ip link set {net_device or 'NETDEV'} up; then look at cable and switch"
        yield Problem(f"{where} is {port.state or 'in no state'} ({port.physical_state})", advice)
    elif infiniband and port.lid == 0:
        yield Problem(f"{where} has no LID", "start a subnet manager (opensm), or see to the switch's")
    if port.chosen_gid is None:
        advice = f"give the net device an address: ip addr add ADDRESS/BITS dev {net_device or 'NETDEV'}"
        yield Problem(f"{where} has no GID", advice)
    elif port.chosen_gid.type.startswith("RoCE") and "only" in port.chosen_because:
        advice = f"give the net device an address: ip addr add ADDRESS/BITS dev {net_device or 'NETDEV'}"
        yield Problem(f"{where} reaches its own network only ({port.chosen_gid.type})", advice, fatal=False)
    roce = port.chosen_gid is not None and port.chosen_gid.type.startswith("RoCE")
    if roce and port.mtu_bytes is not None and port.mtu_bytes < max(PATH_MTU_BYTES):
        advice = f"raise it where the switches allow: ip link set {net_device or 'NETDEV'} mtu 9000"
        what = f"packets of {where} carry {port.mtu_bytes} bytes (the net device's MTU is {net_mtu_bytes})"
        yield Problem(what, advice, fatal=False)
    if port.errors:
        counted = ", ".join(f"{name} {count}" for name, count in port.errors.items())
        advice = "look again later; if they grow, look at cables and at flow and congestion control (docs/rdma.md)"
        yield Problem(f"{where} has counted errors: {counted}", advice, fatal=False)
