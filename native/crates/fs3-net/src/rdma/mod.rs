//! The RDMA transport: one-sided, zero-copy, over reliable connected queue pairs.
//!
//! A connection begins as TCP. In the hello the client offers its ports; the server picks a pair of ports that can reach
//! each other and answers with its end; the client connects its own end and tells it. From then on messages travel by
//! RDMA and the socket stays open as a sign of life. Whatever fails on the way leaves the connection with TCP.
//!
//! Messages are SENDs into receives that the peer has granted (credits). Payload does not travel in them, unless it
//! is small: the server pulls what a client writes with RDMA READ, and pushes what it reads into the caller's
//! memory with RDMA WRITE, as 3FS does.
//!
//! **Memory safety.** The peer may touch exposed memory until it has answered, or says that it will not any more, or
//! until the queue pair is gone. So memory of a call that is given up stays here; the peer is asked to let go of it
//! (`Revoke`), and when it does not answer soon the connection is ended, which ends all access.

pub mod bench;
mod cm;
mod counters;
mod link;
mod memory;
mod nic;
mod receive;
mod wire;

pub(crate) use link::RdmaLink;
pub(crate) use nic::{Ready, decode_end};

use crate::shm;
use counters::Counters;
use nic::{Nic, choose};

use fs3_core::{Code, Error, Result};
use fs3_proto::v1::{RdmaEnd, RdmaPort, rdma_port::Kind};
use fs3_verbs::{DeviceInfo, Gid, GidKind, PortInfo};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which transports a process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// RDMA where both ends have it and it works, else TCP.
    #[default]
    Auto,
    /// TCP only.
    Tcp,
    /// RDMA only; connections to storage without it are refused.
    Rdma,
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "tcp" => Ok(Self::Tcp),
            "rdma" => Ok(Self::Rdma),
            _ => Err(Error::new(Code::InvalidArgument, format!("transport is auto, tcp or rdma, not {text:?}"))),
        }
    }
}

/// How RDMA is used. The defaults are right for most networks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RdmaSettings {
    /// Devices to use, by name; empty: all.
    pub devices: Vec<String>,
    /// Index of the own GID; `None`: the routable one.
    pub gid_index: Option<u8>,
    /// InfiniBand service level, or Ethernet priority.
    pub service_level: u8,
    /// Traffic class; RoCE v2 takes DSCP and ECN from it.
    pub traffic_class: u8,
    /// Index in the table of partition keys.
    pub pkey_index: u16,
    /// Largest path MTU as verbs number it (5 is 4096 bytes); the port's when that is smaller.
    pub mtu_max: u8,
    /// A packet not acknowledged within 4.096 µs × 2^timeout is sent again.
    pub timeout: u8,
    /// How often, at most 7.
    pub retries: u8,
    /// Most memory registered with one device, in bytes.
    pub registered_bytes_max: usize,
}

impl Default for RdmaSettings {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            gid_index: None,
            service_level: 0,
            traffic_class: 0,
            pkey_index: 0,
            mtu_max: 5,
            timeout: 14,
            retries: 7,
            registered_bytes_max: 16 << 30,
        }
    }
}

/// How long a server whose RDMA did not work is asked for TCP at once.
const AVOID: Duration = Duration::from_secs(60);

/// What a process may use to reach others and be reached. Cheap to clone; clones share devices and memory
/// registrations. Thread-safe.
#[derive(Clone)]
pub struct Transport(Arc<Shared>);

struct Shared {
    mode: Mode,
    settings: RdmaSettings,
    /// Why there is no RDMA here, for `Mode::Rdma`.
    why_not: Option<String>,
    ports: Vec<LocalPort>,
    /// Opened when first used.
    nics: parking_lot::Mutex<BTreeMap<(String, u8), Arc<Nic>>>,
    /// What every device that is used has moved.
    counters: BTreeMap<String, Arc<Counters>>,
    /// Payloads may go by reference, and what did.
    shared_memory: Option<Arc<shm::Counters>>,
    /// Servers whose RDMA did not work, and since when.
    avoided: parking_lot::Mutex<BTreeMap<String, Instant>>,
}

/// A port of this machine that can be used.
#[derive(Clone)]
pub(crate) struct LocalPort {
    pub device: String,
    pub number: u8,
    pub gid: Gid,
    pub lid: u16,
    pub kind: Kind,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Transport({:?}, {} ports)", self.0.mode, self.0.ports.len())
    }
}

impl Transport {
    /// Look for devices, as far as `mode` wants them. Nothing is opened yet.
    ///
    /// # Errors
    /// `Unavailable` with `Mode::Rdma` on a machine that cannot do it; the message says why.
    pub fn new(mode: Mode, settings: RdmaSettings) -> Result<Self> {
        let (ports, why_not) = match mode {
            Mode::Tcp => (Vec::new(), None),
            _ => match fs3_verbs::devices() {
                Ok(devices) => {
                    let ports = usable(&devices, &settings);
                    let why_not = ports.is_empty().then(|| nothing_usable(&devices, &settings));
                    (ports, why_not)
                }
                Err(error) => (Vec::new(), Some(error.to_string())),
            },
        };
        if let (Mode::Rdma, Some(why)) = (mode, &why_not) {
            let message = format!("transport = \"rdma\" is not possible: {why}; see `fs3 rdma check`");
            return Err(Error::new(Code::Unavailable, message));
        }
        // Without any wish in the settings a machine without RDMA is nothing to talk about.
        if let (Mode::Auto, Some(why)) = (mode, &why_not)
            && (!settings.devices.is_empty() || settings.gid_index.is_some())
        {
            tracing::warn!("no RDMA, using TCP: {why}; see `fs3 rdma check`");
        }
        let counters = ports.iter().map(|port| (port.device.clone(), Arc::default())).collect();
        Ok(Self(Arc::new(Shared {
            mode,
            counters,
            settings,
            why_not,
            ports,
            shared_memory: None,
            nics: parking_lot::Mutex::default(),
            avoided: parking_lot::Mutex::default(),
        })))
    }

    /// Let payloads to and from processes of this host go through shared memory, unless everything is to go by RDMA. A
    /// process that has enabled its [`fs3_core::Arena`] sends so, every one receives so. For a new transport, before it
    /// is cloned.
    pub fn sharing_memory(mut self) -> Self {
        let shared = Arc::get_mut(&mut self.0).expect("a transport that nobody else has");
        shared.shared_memory = (shared.mode != Mode::Rdma).then(Arc::default);
        self
    }

    /// TCP only.
    pub fn tcp() -> Self {
        Self::new(Mode::Tcp, RdmaSettings::default()).expect("TCP needs nothing")
    }

    /// Whether there is a port to use RDMA with.
    pub fn has_rdma(&self) -> bool {
        !self.0.ports.is_empty()
    }

    /// Why RDMA is not used here, when it was looked for.
    pub fn why_not(&self) -> Option<&str> {
        self.0.why_not.as_deref()
    }

    /// What moved by each device that may be used, by name, since the transport was made: counters by name, which
    /// docs/rdma.md explains. Clones of a transport are counted together.
    pub fn rdma_counters(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        self.0.counters.iter().map(|(device, counters)| (device.clone(), counters.all())).collect()
    }

    /// What moved by shared memory since the transport was made, as docs/operations.md explains it; empty where none is
    /// used. Clones of a transport are counted together.
    pub fn shared_memory_counters(&self) -> Vec<(&'static str, u64)> {
        self.0.shared_memory.iter().flat_map(|counters| counters.all()).collect()
    }

    /// Whether this process shares memory with others, or reads theirs.
    pub fn shares_memory(&self) -> bool {
        self.0.shared_memory.is_some()
    }

    pub(crate) fn shared_memory(&self) -> Option<&Arc<shm::Counters>> {
        self.0.shared_memory.as_ref()
    }

    pub(crate) fn mode(&self) -> Mode {
        self.0.mode
    }

    pub(crate) fn settings(&self) -> &RdmaSettings {
        &self.0.settings
    }

    pub(crate) fn ports(&self) -> &[LocalPort] {
        &self.0.ports
    }

    /// What to offer a server.
    pub(crate) fn offers(&self, addr: &str) -> Vec<RdmaPort> {
        let avoided = self.0.avoided.lock().get(addr).is_some_and(|since| since.elapsed() < AVOID);
        if avoided && self.0.mode == Mode::Auto {
            return Vec::new();
        }
        self.0.ports.iter().map(LocalPort::to_wire).collect()
    }

    /// RDMA with this server did not work on this port: use TCP for a while. Says so once.
    pub(crate) fn avoid(&self, addr: &str, port: u32, why: &Error) {
        if let (Some(port), Mode::Auto) = (self.0.ports.get(port as usize), self.0.mode) {
            self.0.counters[&port.device].fell_back();
        }
        let before = self.0.avoided.lock().insert(addr.to_owned(), Instant::now());
        if before.is_none() {
            tracing::warn!("no RDMA with {addr}, using TCP: {}", why.message);
        }
    }

    /// The client's end of a connection: on the port that the server chose, connected to the server's end.
    pub(crate) async fn prepare(&self, port: usize, peer: &RdmaEnd) -> Result<Ready> {
        let port = self.0.ports.get(port);
        let port = port.ok_or_else(|| Error::new(Code::Protocol, "the server chose a port that was not offered"))?;
        let mut ready = self.nic(port)?.prepare(&self.0.settings)?;
        ready.connect(peer, &self.0.settings).await?;
        Ok(ready)
    }

    /// The server's end of a connection to one of the client's ports, and which; `None` when there is no way.
    pub(crate) fn answer(&self, offered: &[RdmaPort]) -> Option<(Ready, usize)> {
        let (port, theirs) = choose(self, offered)?;
        match self.nic(port).and_then(|nic| nic.prepare(&self.0.settings)?.expecting()) {
            Ok(ready) => Some((ready, theirs)),
            Err(error) => {
                self.0.counters[&port.device].fell_back();
                tracing::warn!("no RDMA on {}: {}", port.device, error.message);
                None
            }
        }
    }

    /// The opened device of a port.
    pub(crate) fn nic(&self, port: &LocalPort) -> Result<Arc<Nic>> {
        let mut nics = self.0.nics.lock();
        if let Some(nic) = nics.get(&(port.device.clone(), port.number)) {
            return Ok(nic.clone());
        }
        let nic = Nic::open(port, &self.0.settings, &self.0.counters[&port.device])?;
        nics.insert((port.device.clone(), port.number), nic.clone());
        Ok(nic)
    }
}

impl LocalPort {
    fn to_wire(&self) -> RdmaPort {
        let gid = self.gid.value.to_vec().into();
        RdmaPort { kind: self.kind as i32, gid, lid: u32::from(self.lid) }
    }
}

/// Whether memory of other devices, by its dma-buf, can be registered with an RDMA device of this machine.
///
/// # Errors
/// `NotSupported`; the message says which devices were asked.
pub fn takes_dmabufs() -> Result<()> {
    let refused = |why: String| {
        Error::new(Code::NotSupported, format!("memory of a GPU (a dma-buf) cannot be registered for RDMA: {why}"))
    };
    let devices = fs3_verbs::devices().map_err(|error| refused(error.0))?;
    if devices.iter().any(|device| fs3_verbs::Device::open(&device.name).is_ok_and(|device| device.takes_dmabufs())) {
        return Ok(());
    }
    let names: Vec<&str> = devices.iter().map(|device| &*device.name).collect();
    Err(refused(match &names[..] {
        [] => "this machine has no RDMA device".to_owned(),
        names => {
            format!("{} cannot do that; it needs a driver that can, Linux 5.12 and rdma-core 34", names.join(", "))
        }
    }))
}

/// Why no port of these devices can be used.
fn nothing_usable(devices: &[DeviceInfo], settings: &RdmaSettings) -> String {
    if devices.is_empty() {
        return "this machine has no RDMA device".to_owned();
    }
    let wanted: Vec<&DeviceInfo> = devices.iter().filter(|d| is_wanted(d, settings)).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = devices.iter().map(|d| d.name.as_str()).collect();
        let (asked, there) = (settings.devices.join(", "), names.join(", "));
        return format!("there is no RDMA device named {asked} on this machine; there are {there}");
    }
    let mut up = wanted.iter().flat_map(|d| &d.ports).filter(|p| p.active).peekable();
    match settings.gid_index {
        Some(index) if up.peek().is_some() => {
            format!("no RDMA port that is up has a usable address at gid_index {index}")
        }
        _ if up.peek().is_some() => "no RDMA port that is up has a usable address".to_owned(),
        _ => "no RDMA port is up".to_owned(),
    }
}

fn is_wanted(device: &DeviceInfo, settings: &RdmaSettings) -> bool {
    settings.devices.is_empty() || settings.devices.contains(&device.name)
}

/// Ports that are up, each with the GID to use, nearest to the running CPU first.
fn usable(devices: &[DeviceInfo], settings: &RdmaSettings) -> Vec<LocalPort> {
    let here = current_numa_node();
    let mut chosen: Vec<&DeviceInfo> = devices.iter().filter(|d| is_wanted(d, settings)).collect();
    chosen.sort_by_key(|d| d.numa_node.is_some() && d.numa_node != here);
    let port = |d: &DeviceInfo, p: &PortInfo| {
        let (gid, kind) = best_gid(p, settings.gid_index)?;
        Some(LocalPort { device: d.name.clone(), number: p.number, gid, lid: p.lid, kind })
    };
    chosen.iter().flat_map(|d| d.ports.iter().filter(|p| p.active).filter_map(|p| port(d, p))).collect()
}

/// The GID of a port that reaches furthest: RoCE v2 over a routable address, over a link-local one, RoCE v1.
pub fn best_gid(port: &PortInfo, wanted: Option<u8>) -> Option<(Gid, Kind)> {
    let kind = |gid: &Gid| match gid.kind {
        GidKind::RoceV2 => Some(Kind::RoceV2),
        GidKind::RoceV1 => Some(Kind::RoceV1),
        GidKind::Native => port.infiniband.then_some(Kind::Infiniband),
        GidKind::Iwarp => Some(Kind::Iwarp),
    };
    let rank = |gid: &&Gid| (gid.kind == GidKind::RoceV2, !gid.is_link_local(), gid.is_ipv4(), u8::MAX - gid.index);
    let candidates = port.gids.iter().filter(|g| wanted.is_none_or(|index| g.index == index));
    let best = candidates.filter(|g| kind(g).is_some()).max_by_key(rank)?;
    Some((best.clone(), kind(best)?))
}

fn current_numa_node() -> Option<u32> {
    let (mut cpu, mut node) = (0u32, 0u32);
    // SAFETY: both out pointers are valid; the third argument is unused.
    let done = unsafe { libc::syscall(libc::SYS_getcpu, &raw mut cpu, &raw mut node, std::ptr::null::<u8>()) };
    (done == 0).then_some(node)
}

/// A verbs error as one of ours.
pub(crate) fn unavailable(error: fs3_verbs::Error) -> Error {
    Error::new(Code::Unavailable, error.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u8, last: u8) -> Gid {
        let mut value = [0; 16];
        (value[10], value[11], value[15]) = (0xff, 0xff, last);
        Gid { index, value, kind: GidKind::RoceV2 }
    }

    fn device(name: &str, gids: Vec<Gid>) -> DeviceInfo {
        let port = PortInfo { number: 1, active: true, lid: 0, infiniband: false, gids };
        DeviceInfo { name: name.into(), numa_node: None, ports: vec![port] }
    }

    #[test]
    fn settings_choose_device_and_address_and_what_is_not_there_is_named() {
        let devices = [device("a", vec![gid(0, 1), gid(3, 2)]), device("b", vec![gid(0, 3)])];
        let ports = |settings: &RdmaSettings| -> Vec<(String, u8)> {
            usable(&devices, settings).into_iter().map(|port| (port.device, port.gid.index)).collect()
        };
        let settings = |devices: &[&str], gid_index| RdmaSettings {
            devices: devices.iter().map(|name| (*name).to_owned()).collect(),
            gid_index,
            ..RdmaSettings::default()
        };
        assert_eq!(ports(&settings(&[], None)), [("a".into(), 0), ("b".into(), 0)]);
        assert_eq!(ports(&settings(&["b"], None)), [("b".into(), 0)]);
        assert_eq!(ports(&settings(&[], Some(3))), [("a".into(), 3)]);
        for (wrong, why) in [
            (settings(&["nosuch"], None), "there is no RDMA device named nosuch on this machine; there are a, b"),
            (settings(&["b"], Some(3)), "no RDMA port that is up has a usable address at gid_index 3"),
        ] {
            assert!(ports(&wrong).is_empty());
            assert_eq!(nothing_usable(&devices, &wrong), why);
        }
    }
}
