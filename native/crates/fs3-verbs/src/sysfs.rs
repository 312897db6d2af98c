//! What the kernel says of its RDMA devices without opening them.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

/// One device with its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name, for example `mlx5_0`.
    pub name: String,
    /// NUMA node the device is attached to, where it has one.
    pub numa_node: Option<u32>,
    /// Ports, in order.
    pub ports: Vec<PortInfo>,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Number, from 1.
    pub number: u8,
    /// Whether the link is up.
    pub active: bool,
    /// Whether it is InfiniBand, addressed by LID; otherwise Ethernet.
    pub infiniband: bool,
    /// Local identifier; 0 on Ethernet.
    pub lid: u16,
    /// Used entries of the GID table.
    pub gids: Vec<Gid>,
}

/// One entry of a port's GID table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Index in the table.
    pub index: u8,
    /// The identifier, in network order.
    pub value: [u8; 16],
    /// What it stands for.
    pub kind: GidKind,
}

/// How packets that are addressed with a GID travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GidKind {
    /// InfiniBand, or iWARP, where the type is not told apart here.
    Native,
    /// RoCE v1: within one Ethernet segment.
    RoceV1,
    /// RoCE v2: over UDP, routable.
    RoceV2,
}

impl Gid {
    /// The IP address that a RoCE v2 GID stands for is link-local.
    pub fn is_link_local(&self) -> bool {
        self.value[0] == 0xfe && self.value[1] & 0xc0 == 0x80
    }

    /// Whether it is an IPv4 address in IPv6 form.
    pub fn is_ipv4(&self) -> bool {
        Ipv6Addr::from(self.value).to_ipv4_mapped().is_some()
    }
}

/// Devices listed in a directory that is laid out as `/sys/class/infiniband`; what cannot be read is left out.
pub fn devices_in(root: &Path) -> Vec<DeviceInfo> {
    let mut found: Vec<DeviceInfo> = names(root).iter().map(|name| device(root, name)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn device(root: &Path, name: &str) -> DeviceInfo {
    let at = root.join(name);
    let numa_node = text(&at.join("device/numa_node")).and_then(|node| node.parse().ok());
    let mut ports: Vec<PortInfo> =
        names(&at.join("ports")).iter().filter_map(|n| port(&at.join("ports").join(n), n.parse().ok()?)).collect();
    ports.sort_by_key(|p| p.number);
    DeviceInfo { name: name.to_owned(), numa_node, ports }
}

fn port(at: &Path, number: u8) -> Option<PortInfo> {
    // "4: ACTIVE"
    let active = text(&at.join("state"))?.starts_with("4:");
    let infiniband = text(&at.join("link_layer"))? == "InfiniBand";
    let lid = text(&at.join("lid")).and_then(|lid| u16::from_str_radix(lid.trim_start_matches("0x"), 16).ok());
    let mut gids: Vec<Gid> = names(&at.join("gids")).iter().filter_map(|n| gid(at, n.parse().ok()?)).collect();
    gids.sort_by_key(|g| g.index);
    Some(PortInfo { number, active, infiniband, lid: lid.unwrap_or(0), gids })
}

fn gid(port: &Path, index: u8) -> Option<Gid> {
    let value = text(&port.join("gids").join(index.to_string()))?.parse::<Ipv6Addr>().ok()?.octets();
    if value == [0; 16] {
        return None;
    }
    let kind = match text(&port.join("gid_attrs/types").join(index.to_string())).as_deref() {
        Some("RoCE v2") => GidKind::RoceV2,
        Some("IB/RoCE v1") if text(&port.join("link_layer"))? == "Ethernet" => GidKind::RoceV1,
        _ => GidKind::Native,
    };
    Some(Gid { index, value, kind })
}

fn names(at: &Path) -> Vec<String> {
    let entries = fs::read_dir(at).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn text(at: &Path) -> Option<String> {
    Some(fs::read_to_string(at).ok()?.trim().to_owned())
}
