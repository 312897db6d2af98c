//! What the kernel says of its RDMA devices without opening them.

use std::ffi::CStr;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// How the kernel numbers iWARP devices among its types of nodes.
const RNIC: &str = "4:";

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
    /// InfiniBand.
    Native,
    /// RoCE v1: within one Ethernet segment.
    RoceV1,
    /// RoCE v2: over UDP, routable.
    RoceV2,
    /// iWARP: over TCP, routable. It has no such table; these are the IP addresses of the port's network device.
    Iwarp,
}

impl Gid {
    /// The IP address that it stands for is link-local.
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
    let iwarp = text(&at.join("node_type")).is_some_and(|kind| kind.starts_with(RNIC));
    let numa_node = text(&at.join("device/numa_node")).and_then(|node| node.parse().ok());
    let mut ports: Vec<PortInfo> = names(&at.join("ports"))
        .iter()
        .filter_map(|n| port(&at.join("ports").join(n), n.parse().ok()?, iwarp))
        .collect();
    ports.sort_by_key(|p| p.number);
    DeviceInfo { name: name.to_owned(), numa_node, ports }
}

fn port(at: &Path, number: u8, iwarp: bool) -> Option<PortInfo> {
    // "4: ACTIVE"
    let active = text(&at.join("state"))?.starts_with("4:");
    let infiniband = text(&at.join("link_layer"))? == "InfiniBand";
    let lid = text(&at.join("lid")).and_then(|lid| u16::from_str_radix(lid.trim_start_matches("0x"), 16).ok());
    let mut gids: Vec<Gid> = if iwarp {
        // Its one GID is the hardware address of its network device.
        let mac = text(&at.join("gids/0"))?.parse::<Ipv6Addr>().ok()?.octets();
        addresses(&mac[..6]).into_iter().zip(0..).map(address_gid).collect()
    } else {
        names(&at.join("gids")).iter().filter_map(|n| gid(at, n.parse().ok()?)).collect()
    };
    gids.sort_by_key(|g| g.index);
    Some(PortInfo { number, active, infiniband, lid: lid.unwrap_or(0), gids })
}

fn address_gid((address, index): (Ipv6Addr, u8)) -> Gid {
    Gid { index, value: address.octets(), kind: GidKind::Iwarp }
}

/// IP addresses of the network device with this hardware address, IPv4 ones in IPv6 form.
fn addresses(mac: &[u8]) -> Vec<Ipv6Addr> {
    let mut list = std::ptr::null_mut();
    // SAFETY: gives a list that lives until it is freed.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let (mut netdevs, mut found, mut at) = (Vec::new(), Vec::new(), list);
    while !at.is_null() {
        // SAFETY: an entry of the list; its name ends with a zero, its address is of the family it says.
        unsafe {
            let (name, address) = (CStr::from_ptr((*at).ifa_name), (*at).ifa_addr);
            at = (*at).ifa_next;
            match if address.is_null() { -1 } else { i32::from((*address).sa_family) } {
                libc::AF_PACKET => {
                    let link = &*address.cast::<libc::sockaddr_ll>();
                    if link.sll_addr.starts_with(mac) {
                        netdevs.push(name);
                    }
                }
                libc::AF_INET => {
                    let address = (*address.cast::<libc::sockaddr_in>()).sin_addr.s_addr;
                    found.push((name, Ipv4Addr::from(address.to_ne_bytes()).to_ipv6_mapped()));
                }
                libc::AF_INET6 => {
                    found.push((name, (*address.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr.into()));
                }
                _ => {}
            }
        }
    }
    let found = found.into_iter().filter(|(name, _)| netdevs.contains(name)).map(|(_, address)| address).collect();
    // SAFETY: not freed before; no name of it is used any more.
    unsafe { libc::freeifaddrs(list) };
    found
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
