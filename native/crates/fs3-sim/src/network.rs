//! The network of a world: delays, losses, partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fs3_net::sim::{Fate, Network};
use fs3_rt::sim::Simulator;
use parking_lot::Mutex;

use crate::options::Options;

const MS: u64 = 1_000_000;
/// How long a lost message is late: a transport sends it again.
const RETRANSMISSION_NS: u64 = 200 * MS;
/// Latest arrivals of a request that arrives once more.
const REPLAYS_NS: [u64; 4] = [MS, 100 * MS, 5_000 * MS, 40_000 * MS];

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Host {
    /// A storage node.
    Node(u32),
    /// A client.
    Client(u32),
    /// The metadata service: always reached.
    Meta,
    /// Others, by the hash of their name: cluster managers.
    Other(u64),
}

impl Host {
    pub fn named(name: &str) -> Self {
        let number = |prefix: &str| name.strip_prefix(prefix).and_then(|rest| rest.parse().ok());
        match (number("node"), number("client")) {
            (Some(node), _) => Self::Node(node),
            (_, Some(client)) => Self::Client(client),
            _ if name == "meta" => Self::Meta,
            _ => Self::Other(name.bytes().fold(7, |hash, b| hash * 31 + u64::from(b))),
        }
    }

    fn hash(self) -> u64 {
        let word = match self {
            Self::Node(n) => u64::from(n),
            Self::Client(n) => 1 << 32 | u64::from(n),
            Self::Meta => 2 << 32,
            Self::Other(n) => n ^ 3 << 40,
        };
        (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }
}

/// A set of hosts, those without a process of the world included.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hosts {
    One(Host),
    Nodes,
    Others,
    /// Half of them.
    Half {
        salt: u64,
        upper: bool,
    },
    All,
}

impl Hosts {
    fn has(self, host: Host) -> bool {
        match self {
            Self::One(one) => one == host,
            Self::Nodes => matches!(host, Host::Node(_)),
            Self::Others => matches!(host, Host::Other(_)),
            Self::Half { salt, upper } => {
                ((host.hash() ^ salt).wrapping_mul(0x94d0_49bb_1331_11eb) >> 63 == 1) == upper
            }
            Self::All => true,
        }
    }
}

struct Cut {
    from: Hosts,
    to: Hosts,
    until_ns: u64,
}

#[derive(Default)]
struct State {
    host_of: BTreeMap<u32, Host>,
    dark: BTreeSet<u32>,
    cuts: Vec<Cut>,
    counts: BTreeMap<&'static str, u64>,
}

/// Decides about every message.
pub(crate) struct Weather {
    sim: Simulator,
    options: Options,
    calm: AtomicBool,
    state: Mutex<State>,
}

impl Weather {
    pub fn new(sim: Simulator, options: Options) -> Self {
        Self { sim, options, calm: AtomicBool::new(false), state: Mutex::default() }
    }

    pub fn place(&self, process: u32, host: Host) {
        self.state.lock().host_of.insert(process, host);
    }

    /// The process has gone with its host's power: nobody tells its peers until the host is back.
    pub fn darken(&self, process: u32) {
        self.state.lock().dark.insert(process);
    }

    /// The host is there again, and tells peers of its former processes that those are gone.
    pub fn lighten_host(&self, host: Host) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.dark.retain(|process| state.host_of.get(process) != Some(&host));
    }

    /// Hold messages back until `until_ns`.
    pub fn cut(&self, from: Hosts, to: Hosts, until_ns: u64) {
        let mut state = self.state.lock();
        let now_ns = self.sim.now_ns();
        state.cuts.retain(|cut| cut.until_ns > now_ns);
        state.cuts.push(Cut { from, to, until_ns });
    }

    /// No faults from now on.
    pub fn heal(&self) {
        self.calm.store(true, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.cuts.clear();
        state.dark.clear();
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.state.lock().counts.clone()
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// How a message of the control plane fares: the delays of its copies.
    pub fn control(&self, from: Host, to: Host) -> Vec<u64> {
        let delay = || 100_000 + self.sim.below(2 * MS);
        if self.is_calm() {
            return vec![delay()];
        }
        let mut state = self.state.lock();
        if state.is_cut(from, to, self.sim.now_ns()) {
            return Vec::new();
        }
        if self.sim.chance(self.options.loss_ppm) {
            state.count("control messages lost");
            return Vec::new();
        }
        let late = self.late(&mut state);
        let mut delays = vec![delay() + late];
        if self.sim.chance(self.options.duplicate_ppm) {
            state.count("control messages duplicated");
            delays.push(delay() + self.sim.below(2_000 * MS));
        }
        delays
    }

    fn late(&self, state: &mut State) -> u64 {
        if !self.sim.chance(self.options.slow_ppm) {
            return 0;
        }
        state.count("messages slow");
        self.sim.below(self.options.slow_ms_max.max(1) * MS)
    }
}

impl State {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn host(&self, process: u32) -> Host {
        self.host_of.get(&process).copied().unwrap_or(Host::Meta)
    }

    fn is_cut(&self, from: Host, to: Host, now_ns: u64) -> bool {
        let cut = |cut: &Cut| cut.until_ns > now_ns && cut.from.has(from) && cut.to.has(to);
        from != to && from != Host::Meta && to != Host::Meta && self.cuts.iter().any(cut)
    }
}

/// The weather as the transport asks for it.
pub(crate) struct Shared(pub Arc<Weather>);

impl Network for Shared {
    fn fate(&self, from: u32, to: u32, bytes: usize) -> Fate {
        let weather = &*self.0;
        let (sim, options) = (&weather.sim, &weather.options);
        let mut fate = Fate { delay_ns: 30_000 + sim.below(300_000) + bytes as u64, ..Fate::default() };
        let mut state = weather.state.lock();
        let reliable = state.host(from) == Host::Meta || state.host(to) == Host::Meta;
        if reliable || weather.is_calm() {
            return fate;
        }
        if sim.chance(options.loss_ppm) {
            state.count("messages lost");
            fate.delay_ns += RETRANSMISSION_NS << sim.below(3);
        }
        fate.delay_ns += weather.late(&mut state);
        fate.reset = sim.chance(options.reset_ppm);
        fate.damaged = sim.chance(options.damage_ppm);
        if sim.chance(options.duplicate_ppm) {
            fate.replay_ns = Some(sim.below(REPLAYS_NS[sim.below(REPLAYS_NS.len() as u64) as usize]));
        }
        for (happened, what) in [
            (fate.reset, "connections reset"),
            (fate.damaged, "messages damaged"),
            (fate.replay_ns.is_some(), "messages duplicated"),
        ] {
            if happened {
                state.count(what);
            }
        }
        fate
    }

    fn is_cut(&self, from: u32, to: u32) -> bool {
        let state = self.0.state.lock();
        state.is_cut(state.host(from), state.host(to), self.0.sim.now_ns())
    }

    fn is_dark(&self, process: u32) -> bool {
        self.0.state.lock().dark.contains(&process)
    }
}
