//! What a world is like. Everything that is not given follows from the seed (a swarm of configurations).

use fs3_rt::sim::Simulator;
use serde::{Deserialize, Serialize};

/// Rates are per million messages; periods are mean virtual milliseconds between two of a kind, 0: never.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// How slowly the world lives: times drawn from the seed are so many times as long.
    pub pace: u64,
    /// Storage nodes.
    pub nodes: u32,
    /// Clients.
    pub clients: u32,
    /// Chunks that the clients work on.
    pub chunks: u32,
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
    /// Mean pause of a client between two operations, milliseconds.
    pub think_ms: u64,
    /// How long an operation may take, milliseconds.
    pub op_timeout_ms: u64,
    /// Every write survives power loss before it is acknowledged.
    pub durable_writes: bool,
    /// Chunks are removed too.
    pub removes: bool,
    /// Messages that are lost: late by a retransmission, or never there for control messages.
    pub loss_ppm: u64,
    /// Requests that arrive twice.
    pub duplicate_ppm: u64,
    /// Messages that are late, by up to `slow_ms_max`.
    pub slow_ppm: u64,
    /// See `slow_ppm`.
    pub slow_ms_max: u64,
    /// Messages that break their connection.
    pub reset_ppm: u64,
    /// Payloads with a changed bit.
    pub damage_ppm: u64,
    /// A node's process is killed.
    pub crash_ms: u64,
    /// The processes of all nodes are killed.
    pub total_crash_ms: u64,
    /// A node loses power; only with `durable_writes`.
    pub power_ms: u64,
    /// All nodes lose power at once. Without `durable_writes` what was not synced may be gone then.
    pub total_power_ms: u64,
    /// A node's process is stopped for a while.
    pub pause_ms: u64,
    /// Some hosts cannot reach others for a while.
    pub partition_ms: u64,
    /// A client does not hear a node for a while, which hears the client.
    pub deaf_ms: u64,
    /// The disks of a node are slow for a while.
    pub slow_disk_ms: u64,
    /// A disk reports an error.
    pub disk_error_ms: u64,
    /// Stored bytes of node 0 change: a bit, or a write that goes elsewhere or nowhere. Only nodes 0 and 2 fail otherwise then.
    pub rot_ms: u64,
    /// A client is killed and another one begins.
    pub client_crash_ms: u64,
}

impl Options {
    /// Options that follow from `seed`, except for what `given` (a JSON object) says.
    ///
    /// # Errors
    /// In one line what is wrong with `given`.
    pub fn draw(seed: u64, given: &str) -> Result<Self, String> {
        let wrong = |e: serde_json::Error| format!("the options of the simulation are wrong: {e}");
        let given: serde_json::Map<String, serde_json::Value> =
            if given.trim().is_empty() { Default::default() } else { serde_json::from_str(given).map_err(wrong)? };
        let pace = given.get("pace").and_then(serde_json::Value::as_u64).unwrap_or(1);
        let mut drawn = serde_json::to_value(Self::drawn(seed).at_pace(pace)).map_err(wrong)?;
        let fields = drawn.as_object_mut().expect("options are an object");
        fields.extend(given);
        let options: Self = serde_json::from_value(drawn).map_err(wrong)?;
        options.checked()
    }

    /// A world without faults.
    pub fn calm() -> Self {
        Self {
            pace: 1,
            nodes: 3,
            clients: 2,
            chunks: 3,
            chunk_bytes: 64 << 10,
            think_ms: 500,
            op_timeout_ms: 30_000,
            durable_writes: false,
            removes: true,
            loss_ppm: 0,
            duplicate_ppm: 0,
            slow_ppm: 0,
            slow_ms_max: 0,
            reset_ppm: 0,
            damage_ppm: 0,
            crash_ms: 0,
            total_crash_ms: 0,
            power_ms: 0,
            total_power_ms: 0,
            pause_ms: 0,
            partition_ms: 0,
            deaf_ms: 0,
            slow_disk_ms: 0,
            disk_error_ms: 0,
            rot_ms: 0,
            client_crash_ms: 0,
        }
    }

    fn drawn(seed: u64) -> Self {
        // Its own source, so that an option that is given changes nothing else.
        let random = Simulator::new(seed ^ 0x006f_7074_696f_6e73);
        // A kind of fault that may be there: not at all, or anything up to `max`.
        let rate = |percent: u64, max: u64| {
            let strength = random.below(100);
            if random.below(100) < percent { 1 + max * strength * strength / 10_000 } else { 0 }
        };
        let period = |percent: u64, least_ms: u64| {
            let times = 1 + random.below(10);
            if random.below(100) < percent { least_ms * times } else { 0 }
        };
        let calm = Self::calm();
        let durable_writes = random.below(3) == 0;
        let rot_ms = period(20, 10_000);
        let quiet = rot_ms != 0;
        Self {
            nodes: if random.below(4) == 0 { 4 } else { 3 },
            clients: 1 + random.below(4) as u32,
            chunks: 1 + random.below(6) as u32,
            think_ms: 100 + random.below(1500),
            op_timeout_ms: [5_000, 30_000][random.below(2) as usize],
            durable_writes,
            removes: random.below(3) != 0,
            loss_ppm: rate(60, 300_000),
            duplicate_ppm: rate(60, 500_000),
            slow_ppm: rate(50, 200_000),
            slow_ms_max: [100, 2_000, 12_000][random.below(3) as usize],
            reset_ppm: rate(40, 50_000),
            damage_ppm: rate(30, 20_000),
            crash_ms: period(85, 5_000),
            total_crash_ms: if quiet { 0 } else { period(40, 30_000) },
            power_ms: if durable_writes { period(60, 10_000) } else { 0 },
            total_power_ms: if durable_writes && !quiet { period(40, 30_000) } else { 0 },
            pause_ms: period(50, 8_000),
            partition_ms: period(60, 8_000),
            slow_disk_ms: period(30, 15_000),
            disk_error_ms: if quiet { 0 } else { period(40, 20_000) },
            rot_ms,
            client_crash_ms: period(30, 30_000),
            deaf_ms: period(30, 8_000),
            ..calm
        }
    }

    fn at_pace(mut self, pace: u64) -> Self {
        self.pace = pace;
        let times = [
            &mut self.think_ms,
            &mut self.op_timeout_ms,
            &mut self.crash_ms,
            &mut self.total_crash_ms,
            &mut self.power_ms,
            &mut self.total_power_ms,
            &mut self.pause_ms,
            &mut self.partition_ms,
            &mut self.deaf_ms,
            &mut self.slow_disk_ms,
            &mut self.disk_error_ms,
            &mut self.rot_ms,
            &mut self.client_crash_ms,
        ];
        times.into_iter().for_each(|time| *time = time.saturating_mul(pace));
        self
    }

    fn checked(self) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("the options of the simulation are wrong: {what}"));
        if self.pace == 0 || self.pace > 1000 {
            return wrong("pace must be 1 to 1000");
        }
        if self.nodes == 0 || self.nodes > 64 || self.clients == 0 || self.chunks == 0 {
            return wrong("nodes must be 1 to 64, clients and chunks at least 1");
        }
        if !self.chunk_bytes.is_power_of_two() || !(1 << 16..=1 << 26).contains(&self.chunk_bytes) {
            return wrong("chunk_bytes must be a power of two from 65536 to 67108864");
        }
        // A replica that lost power alone may be the first to serve after the loss of its whole chain much later.
        if !self.durable_writes && self.power_ms != 0 {
            return wrong("power_ms needs durable_writes: other writes may be lost with the power");
        }
        Ok(self)
    }
}
