//! The work of the clients, and what they see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fs3_client::{Caller, Client, ClientConfig, OpenFile, OpenOptions, at_inode};
use fs3_core::{Error, Region, RegionMut, Result};
use fs3_rt::sim::{Process, Simulator};
use fs3_rt::{JoinSet, sleep};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::control::Control;
use crate::history::{History, Kind, Outcome, VALUE_BYTES, bytes_of};
use crate::meta::{INODE, META_ADDRESS, TOKEN};
use crate::network::{Host, Weather};
use crate::options::Options;

/// Operations that one client has under way at a time.
const UNDER_WAY_MAX: usize = 4;
/// Bytes of a small write or read.
const SMALL_BYTES: u64 = 16 << 10;

/// All clients of a world.
pub(crate) struct Load {
    sim: Simulator,
    options: Options,
    pub history: Mutex<History>,
    on: watch::Sender<bool>,
    under_way: AtomicU64,
    values: AtomicU64,
    clients: Mutex<BTreeMap<u32, Process>>,
    clients_made: AtomicU64,
    weather: Arc<Weather>,
}

/// One operation that a client has begun; forgotten when its client is killed.
struct Begun {
    load: Arc<Load>,
    number: usize,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.load.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Begun {
    fn end(&self, result: &Result<()>) {
        let outcome = match result {
            Ok(()) => Outcome::Ok,
            Err(error) if error.maybe_applied => Outcome::Unknown,
            // Of a request that arrives twice one copy may be refused, and heard of first, while the other is carried out.
            // No byte stream does that to a client; the faults of this network are harsher than its errors can say.
            Err(_) if self.load.options.duplicate_ppm > 0 => Outcome::Unknown,
            Err(_) => Outcome::Failed,
        };
        let now_ns = self.load.sim.now_ns();
        self.load.history.lock().complete(self.number, outcome, now_ns);
        self.load.sim.trace(21, self.number as u64, outcome as u64);
    }
}

impl Load {
    pub fn new(sim: Simulator, options: Options, weather: Arc<Weather>) -> Arc<Self> {
        Arc::new(Self {
            sim,
            options,
            history: Mutex::default(),
            on: watch::Sender::new(false),
            under_way: AtomicU64::new(0),
            values: AtomicU64::new(0),
            clients: Mutex::default(),
            clients_made: AtomicU64::new(0),
            weather,
        })
    }

    pub fn set_on(&self, on: bool) {
        self.on.send_replace(on);
    }

    /// Whether no operation is under way.
    pub fn is_quiet(&self) -> bool {
        self.under_way.load(Ordering::Relaxed) == 0
    }

    /// Begin a client in place `place`, instead of the one there is.
    pub fn start_client(self: &Arc<Self>, place: u32) {
        let number = self.clients_made.fetch_add(1, Ordering::Relaxed) as u32;
        let process = self.sim.process(&format!("client{number}"));
        self.weather.place(process.number(), Host::Client(place));
        let former = self.clients.lock().insert(place, process.clone());
        if let Some(former) = former {
            former.kill();
        }
        let load = self.clone();
        drop(process.spawn(async move { load.client(number).await }));
    }

    fn begin(self: &Arc<Self>, client: u32, chunk: u32, kind: Kind) -> Begun {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        let number = self.history.lock().invoke(client, chunk, kind, self.sim.now_ns());
        self.sim.trace(20, number as u64, u64::from(chunk));
        Begun { load: self.clone(), number }
    }

    /// A client from its connection to its end.
    async fn client(self: Arc<Self>, number: u32) {
        let user = loop {
            match User::connect(self.clone(), number).await {
                Ok(user) => break Arc::new(user),
                Err(_) => sleep(Duration::from_secs(1)).await,
            }
        };
        let mut on = self.on.subscribe();
        let mut running: JoinSet<()> = JoinSet::new();
        loop {
            if on.wait_for(|on| *on).await.is_err() {
                return;
            }
            sleep(Duration::from_nanos(self.sim.below(2 * self.options.think_ms * 1_000_000))).await;
            while running.len() >= UNDER_WAY_MAX {
                drop(running.join_next().await);
            }
            if *on.borrow() {
                let user = user.clone();
                running.spawn(async move { user.operate().await });
            }
        }
    }

    /// Read all chunks through a new client; what was seen goes into the history.
    ///
    /// # Errors
    /// Why a chunk cannot be read.
    pub async fn read_all(self: Arc<Self>) -> Result<()> {
        let user = User::connect(self.clone(), u32::MAX).await?;
        for chunk in 0..self.options.chunks {
            user.read(chunk, 0, self.options.chunk_bytes).await?;
        }
        Ok(())
    }
}

/// A connected client at work.
struct User {
    load: Arc<Load>,
    number: u32,
    control: Control,
    file: Arc<OpenFile>,
    /// Chunks that it has written to since its last sync: a sync goes to their chains, and to no others.
    written: Mutex<BTreeSet<u32>>,
}

impl User {
    async fn connect(load: Arc<Load>, number: u32) -> Result<Self> {
        let client = Client::connect(ClientConfig {
            metas: vec![META_ADDRESS.into()],
            token: TOKEN.into(),
            op_timeout: Duration::from_millis(load.options.op_timeout_ms),
            write_channels: UNDER_WAY_MAX,
            ..ClientConfig::default()
        })
        .await?;
        let options = OpenOptions { read: true, write: true, truncate: false };
        let file = client.open(&Caller::default(), at_inode(INODE), options).await?;
        let control = Control::new(client, load.options.chunk_bytes);
        Ok(Self { load, number, control, file, written: Mutex::default() })
    }

    /// One operation of any kind.
    async fn operate(&self) {
        let (load, options) = (&self.load, &self.load.options);
        let sim = &load.sim;
        let chunk = sim.below(u64::from(options.chunks)) as u32;
        let place = || {
            let blocks = u64::from(options.chunk_bytes / VALUE_BYTES);
            let from = sim.below(blocks);
            let most = (SMALL_BYTES / u64::from(VALUE_BYTES)).min(blocks - from);
            ((from as u32) * VALUE_BYTES, (1 + sim.below(most)) as u32 * VALUE_BYTES)
        };
        match sim.below(100) {
            0..35 => {
                let (offset, length) = place();
                let _ = self.read(chunk, offset, length).await;
            }
            35..45 => {
                let _ = self.read(chunk, 0, options.chunk_bytes).await;
            }
            45..60 => self.write(chunk, 0, options.chunk_bytes).await,
            60..88 => {
                let (offset, length) = place();
                self.write(chunk, offset, length).await;
            }
            88..90 => {
                let (offset, length) = place();
                self.punch(chunk, offset, length).await;
            }
            90..92 => self.truncate(chunk, place().0).await,
            92..95 if options.removes => self.remove(chunk).await,
            _ => self.sync().await,
        }
    }

    fn at(&self, chunk: u32, offset: u32) -> u64 {
        u64::from(chunk) * u64::from(self.load.options.chunk_bytes) + u64::from(offset)
    }

    async fn read(&self, chunk: u32, offset: u32, length: u32) -> Result<()> {
        let begun = self.load.begin(self.number, chunk, Kind::Read { offset, length, seen: Vec::new() });
        let (result, buf) = self.file.read(self.at(chunk, offset), RegionMut::zeroed(length as usize)).await;
        if let Ok(count) = result {
            let now_ns = self.load.sim.now_ns();
            self.load.history.lock().complete_read(begun.number, &buf[..count], now_ns);
            self.load.sim.trace(22, begun.number as u64, u64::from(fs3_core::crc32c(&buf)));
            return Ok(());
        }
        let result = result.map(drop);
        begun.end(&result);
        result
    }

    async fn write(&self, chunk: u32, offset: u32, length: u32) {
        let value = self.load.values.fetch_add(1, Ordering::Relaxed) + 1;
        let begun = self.load.begin(self.number, chunk, Kind::Write { offset, length, value });
        let result = self.file.write(self.at(chunk, offset), Region::from_vec(bytes_of(value, length))).await;
        if result.is_ok() {
            self.written.lock().insert(chunk);
        }
        begun.end(&result.map(drop));
    }

    async fn punch(&self, chunk: u32, offset: u32, length: u32) {
        let begun = self.load.begin(self.number, chunk, Kind::Punch { offset, length });
        begun.end(&self.file.punch(self.at(chunk, offset), u64::from(length)).await);
    }

    async fn truncate(&self, chunk: u32, length: u32) {
        let begun = self.load.begin(self.number, chunk, Kind::Truncate { length });
        begun.end(&self.control.truncate(chunk, length, self.timeout()).await);
    }

    async fn remove(&self, chunk: u32) {
        let begun = self.load.begin(self.number, chunk, Kind::Remove);
        begun.end(&self.control.remove(chunk, self.timeout()).await);
    }

    /// Sync everything that this client has written. What others wrote to the same chunks is covered too.
    async fn sync(&self) {
        let mut written = std::mem::take(&mut *self.written.lock());
        let begun: Vec<Begun> = written.iter().map(|c| self.load.begin(self.number, *c, Kind::Sync)).collect();
        let result: Result<()> = self.file.sync().await.map(drop).map_err(Error::maybe_applied);
        if result.is_err() {
            self.written.lock().append(&mut written);
        }
        begun.iter().for_each(|begun| begun.end(&result));
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.load.options.op_timeout_ms)
    }
}
