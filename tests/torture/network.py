"""Where the members of a campaign run: in network namespaces, between which packets get lost, or on one host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable

# Of the block reserved for benchmarks of networks (RFC 2544): nothing routes there.
PREFIX = "198.18"
SUBNETS = 254
CONTROLLER_HOST = 250
COMMAND_S = 20


class Host:
    """All members on the loopback interface. They share memory."""

    def __init__(self, members: Iterable[str]) -> None:
        self.members = list(members)

    def address(self, member: str) -> str:
        """IPv4 address of a member."""
        return "127.0.0.1"

    def inside(self, member: str) -> list[str]:
        """What to put before a command so that it runs in the member's network."""
        return []

    def create(self) -> None:
        """Make everything. What was made is taken away by `destroy` also after an error here."""

    def destroy(self) -> None:
        """Take everything away; nothing of it needs to be there."""


class Network(Host):
    """Namespaces named after their members, on a subnet of their own, with a bridge; packets are dropped by nftables.

    The controller's own namespace has an address too, which is never cut off: it is the operator's line.
    """

    def __init__(self, members: Iterable[str]) -> None:
        super().__init__(members)
        self.tag = f"fs3t{os.getpid()}"
        self.subnet = _free_subnet()
        self._drops: dict[tuple[str, str], int] = {}

    def address(self, member: str) -> str:
        return f"{PREFIX}.{self.subnet}.{self.members.index(member) + 1}"

    def namespace(self, member: str) -> str:
        """Name of its namespace."""
        return f"{self.tag}-{member}"

    def inside(self, member: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace(member)}", "--"]

    def create(self) -> None:
        switch = f"{self.tag}-sw"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for i, member in enumerate(self.members):
            space = self.namespace(member)
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", switch, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._join(switch, f"v{i}", ["-n", space], "eth0", i + 1)
        outside = f"{self.tag}c"
        _run(
            "ip", "-n", switch, "link", "add", "vc", "type", "veth", "peer", "name", outside, "netns", str(os.getpid())
        )
        self._join(switch, "vc", [], outside, CONTROLLER_HOST)

    def _join(self, switch: str, port: str, where: list[str], device: str, host: int) -> None:
        _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        _run("ip", *where, "addr", "add", f"{PREFIX}.{self.subnet}.{host}/24", "dev", device)
        _run("ip", *where, "link", "set", device, "up")

    def destroy(self) -> None:
        for name in [*map(self.namespace, self.members), f"{self.tag}-sw"]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=COMMAND_S, check=False)
        # The veth pairs went with their namespaces.

    def drop(self, source: str, destination: str, percent: int = 100) -> None:
        """Drop that share of the packets from `source` on arrival at `destination`."""
        self._drops[source, destination] = percent
        self._apply(destination)

    def restore(self, source: str, destination: str) -> None:
        """Let packets pass again."""
        if self._drops.pop((source, destination), None) is not None:
            self._apply(destination)

    def _apply(self, destination: str) -> None:
        rules = []
        for (source, to), percent in self._drops.items():
            if to == destination:
                chance = "" if percent >= 100 else f"numgen random mod 100 < {percent} "
                rules.append(f"add rule inet torture arrival ip saddr {self.address(source)} {chance}drop")
        script = [
            "flush ruleset",
            "add table inet torture",
            "add chain inet torture arrival { type filter hook input priority 0; }",
            *rules,
        ]
        _run(*self.inside(destination), "nft", "-f", "-", stdin="\n".join(script) + "\n")


def _free_subnet() -> int:
    used = {a["local"] for link in json.loads(_run("ip", "-json", "addr")) for a in link.get("addr_info", [])}
    for i in range(SUBNETS):
        number = (os.getpid() + i) % SUBNETS + 1
        if not any(address.startswith(f"{PREFIX}.{number}.") for address in used):
            return number
    raise RuntimeError(f"every subnet of {PREFIX}.0.0/16 is in use; remove left-over interfaces (ip -br addr)")


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def missing_tools() -> str:
    """Why namespaces cannot be made here; "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces and mounts take root"
    for tool in ("ip", "nft", "nsenter", "unshare"):
        with contextlib.suppress(FileNotFoundError):
            subprocess.run([tool, "--version"], capture_output=True, timeout=COMMAND_S, check=False)
            continue
        return f"the program {tool} is missing: install iproute2, nftables, util-linux"
    probe = subprocess.run(["unshare", "--net", "nft", "list", "ruleset"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else f"nftables cannot be used: {probe.stderr.decode().strip()}"


def sweep() -> None:
    """Take away the namespaces of campaigns that were killed and could not do so themselves."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix("fs3t").partition("-")[0]
        if name.startswith("fs3t") and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=COMMAND_S, check=False)
