//! One target: its store, its chain machine, and the executor between them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fs3_chain::{
    Config, Content, Effect, Event, Kind, OpId, Origin, Outcome, ReadAdmission, Refusal, Replica, Request, RequestId,
    Role, RoutingView, Writer,
};
use fs3_core::{ChainVersion, ChunkId, Code, Error, Result, UpdateVersion};
use fs3_io::{Change, TargetStore, Update, VersionInfo, WriterRecord};
use fs3_proto::v1::LocalState;
use fs3_rt::{Instant, monotonic_ns};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::content::Job;
use crate::core::Core;
use crate::kv_chunks::KvChunks;
use crate::resync::Progress;
use crate::upkeep::Upkeep;
use crate::view::StoreView;

/// A life that was at least this long owes nothing to what ended the one before.
const LIFE_EXPECTED: Duration = Duration::from_secs(600);

/// A target whose store is open. Thread-safe.
pub(crate) struct Target {
    pub id: u64,
    pub chain_id: u32,
    pub store: Arc<TargetStore>,
    pub core: Arc<Core>,
    pub upkeep: Arc<Upkeep>,
    pub kv: KvChunks,
    /// How many lives of the target ended early, one after the other, before this one.
    setbacks: u32,
    began: Instant,
    machine: Mutex<Machine>,
    pub life: Mutex<Life>,
    /// Held by every task that changes the store.
    changing: Arc<()>,
}

/// What the target tells the manager of itself.
#[derive(Default)]
pub(crate) struct Life {
    /// The manager knows of this start: routing has shown the target as neither serving nor syncing, or it is new.
    pub ready: bool,
    pub uptodate: bool,
    pub error: Option<String>,
    /// The last error that may take the target offline, and where.
    noted: Option<(ChunkId, String)>,
    /// Why the life before ended, if that was in this process.
    pub former_error: Option<String>,
    /// Successors that are brought up to date, under this chain version.
    pub resyncs: BTreeMap<u64, Progress>,
}

/// Something to do.
type Step = Box<dyn FnOnce() + Send>;

struct Machine {
    replica: Replica,
    jobs: BTreeMap<OpId, Arc<Job>>,
    askers: BTreeMap<RequestId, oneshot::Sender<Result<Outcome, Refusal>>>,
    readers: BTreeMap<RequestId, oneshot::Sender<Result<(), Code>>>,
    next_request: RequestId,
}

impl Target {
    pub fn new(
        id: u64,
        chain_id: u32,
        store: Arc<TargetStore>,
        core: Arc<Core>,
        upkeep: Arc<Upkeep>,
        ready: bool,
    ) -> Arc<Self> {
        Self::begin(id, chain_id, store, core, upkeep, 0, Life { ready, ..Life::default() })
    }

    fn begin(
        id: u64,
        chain_id: u32,
        store: Arc<TargetStore>,
        core: Arc<Core>,
        upkeep: Arc<Upkeep>,
        setbacks: u32,
        life: Life,
    ) -> Arc<Self> {
        let machine = Machine {
            replica: Replica::new(Config::default()),
            jobs: BTreeMap::new(),
            askers: BTreeMap::new(),
            readers: BTreeMap::new(),
            next_request: 1,
        };
        let (machine, life, changing) = (Mutex::new(machine), Mutex::new(life), Arc::default());
        let kv = KvChunks::default();
        Arc::new(Self {
            id,
            chain_id,
            store,
            core,
            upkeep,
            kv,
            setbacks,
            began: Instant::now(),
            machine,
            life,
            changing,
        })
    }

    /// The target after it gave up: it takes part again once the manager has seen that, like after a restart of the
    /// process. Call it when nothing changes the store any more.
    pub fn next_life(&self) -> Arc<Self> {
        let life = Life { former_error: self.life.lock().error.clone(), ..Life::default() };
        let (store, core, upkeep) = (self.store.clone(), self.core.clone(), self.upkeep.clone());
        Self::begin(self.id, self.chain_id, store, core, upkeep, self.setbacks() + 1, life)
    }

    /// Forget this target's part of the key-value cache. To be called when nothing is admitted any more: what comes later
    /// finds another epoch.
    pub fn forget_cached(&self) {
        self.core.kv.with(|cache, now_ms| cache.clear_target(self.id, now_ms));
    }

    /// How many lives have ended early, one after the other, when this one ends now.
    pub fn setbacks(&self) -> u32 {
        if self.began.elapsed() < LIFE_EXPECTED { self.setbacks } else { 0 }
    }

    /// Whether disk work of this life is still going on.
    pub fn is_changing(&self) -> bool {
        Arc::strong_count(&self.changing) > 1
    }

    /// Feed one event and carry out what follows from it.
    pub fn drive(self: &Arc<Self>, event: Event) {
        let steps: Vec<Step> = {
            let mut machine = self.machine.lock();
            let effects = machine.replica.step(monotonic_ns(), event, &StoreView(&self.store));
            effects.into_iter().filter_map(|effect| self.carry_out(&mut machine, effect)).collect()
        };
        // Each may wake a thread that wants the machine next.
        for step in steps {
            step();
        }
    }

    /// Begin with an effect; returns what is left to do when the machine is unlocked.
    fn carry_out(self: &Arc<Self>, machine: &mut Machine, effect: Effect) -> Option<Step> {
        let this = self.clone();
        let changing = self.changing.clone();
        let step: Step = match effect {
            Effect::Prepare { op, chunk, version, content } => {
                let chain_version = machine.replica.routing().chain_version;
                let job = machine.jobs.get(&op).cloned().unwrap_or_else(|| Arc::new(Job::mirror(chunk)));
                Box::new(move || this.begin_prepare(changing, op, job, version, chain_version, content))
            }
            Effect::Commit { op, chunk, version } => Box::new(move || {
                this.clone().store.commit_then(chunk, UpdateVersion(version), move |result| {
                    let result = result.map(drop).map_err(|e| this.note(chunk, &e));
                    drop(changing);
                    this.drive(Event::Committed { op, chunk, result });
                });
            }),
            Effect::Abort { op, chunk, version } => Box::new(move || {
                this.core.clone().spawn(async move {
                    if let Err(e) = this.store.abort(chunk, UpdateVersion(version)).await {
                        this.note(chunk, &e);
                    }
                    drop(changing);
                    this.drive(Event::Aborted { op, chunk });
                });
            }),
            Effect::Repair { op, chunk } => Box::new(move || {
                this.core.clone().spawn(async move {
                    let result = this.mend(chunk).await.map_err(|e| e.code);
                    drop(changing);
                    this.drive(Event::Repaired { op, chunk, result });
                });
            }),
            Effect::Forward { op, chunk, to, attempt, chain_version, version, base, content, delay_ns } => {
                let job = machine.jobs.get(&op).cloned().unwrap_or_else(|| Arc::new(Job::mirror(chunk)));
                let forward = crate::forward::Forward { to, chain_version, version, base, content };
                Box::new(move || {
                    this.core.clone().begin(async move {
                        if delay_ns > 0 {
                            fs3_rt::sleep(Duration::from_nanos(delay_ns)).await;
                            if !this.machine.lock().replica.forward_is_current(op, chunk, to, attempt) {
                                return;
                            }
                        }
                        let result = this.send_forward(&job, forward).await.map_err(|e| {
                            tracing::debug!(target_id = this.id, to = to.0, %chunk, attempt, "forward: {e}");
                            if e.code == Code::ChecksumMismatch {
                                this.note(chunk, &e);
                            }
                            e.code
                        });
                        this.drive(Event::Forwarded { op, chunk, to, attempt, result });
                    });
                })
            }
            Effect::Reply { id, result } => {
                if let Some(reader) = machine.readers.remove(&id) {
                    Box::new(move || _ = reader.send(result.map(drop).map_err(|r| r.code)))
                } else {
                    let asker = machine.askers.remove(&id)?;
                    Box::new(move || _ = asker.send(result))
                }
            }
            Effect::ServeRead { id } => {
                let reader = machine.readers.remove(&id)?;
                Box::new(move || _ = reader.send(Ok(())))
            }
            Effect::Done { op } => {
                machine.jobs.remove(&op);
                return None;
            }
            Effect::Fatal { chunk, code } => {
                let mut life = self.life.lock();
                let noted = life.noted.take().filter(|(at, _)| *at == chunk).map(|(_, text)| text);
                let known =
                    life.error.get_or_insert_with(|| noted.unwrap_or_else(|| format!("chunk {chunk}: {code:?}")));
                tracing::error!(target_id = self.id, "the target goes offline: {known}");
                Box::new(move || this.core.clone().spawn(this.core.clone().begin_next_life(this)))
            }
        };
        Some(step)
    }

    /// Put an update on the disk; the common case goes on where the disk work was done.
    fn begin_prepare(
        self: Arc<Self>,
        changing: Arc<()>,
        op: OpId,
        job: Arc<Job>,
        version: u64,
        chain_version: u64,
        content: Content,
    ) {
        let (this, chunk) = (self.clone(), job.chunk);
        let prepared = move |result: Result<VersionInfo>| {
            let result = result.map(|v| outcome_of(&v)).map_err(|e| this.note(chunk, &e));
            drop(changing);
            this.drive(Event::Prepared { op, chunk, result });
        };
        match job.given_change(content).filter(|_| !job.durable) {
            Some(change) => {
                let update = update_of(&job, version, chain_version, change, job.chunk_bytes);
                self.store.prepare_then(update, prepared);
            }
            None => self.core.clone().spawn(async move {
                prepared(self.prepare(&job, version, chain_version, content).await);
            }),
        }
    }

    async fn prepare(&self, job: &Job, version: u64, chain_version: u64, content: Content) -> Result<VersionInfo> {
        let change = match content {
            Content::Fetched { from, outcome } => {
                Some((self.fetch_updated(job, from, outcome).await?, job.chunk_bytes))
            }
            content => job.change(&self.store, &self.core.pool, content).await?,
        };
        let Some((change, chunk_bytes)) = change else {
            return Err(Error::new(Code::Internal, format!("chunk {} vanished during its repair", job.chunk)));
        };
        let update = update_of(job, version, chain_version, change, chunk_bytes);
        let began = Instant::now();
        let info = self.store.prepare(update).await?;
        if job.durable {
            self.store.sync().await?;
        }
        self.upkeep.disk.observe(began.elapsed());
        Ok(info)
    }

    /// Keep the text of an error that may take the target offline, and see to rot.
    fn note(self: &Arc<Self>, chunk: ChunkId, error: &Error) -> Code {
        if matches!(error.code, Code::DiskError | Code::Internal | Code::ChecksumMismatch) {
            self.life.lock().noted = Some((chunk, format!("chunk {chunk}: {error}")));
        }
        if error.code == Code::ChecksumMismatch && self.store.chunk(chunk).is_some_and(|meta| meta.rotten) {
            self.found_rot(chunk);
        }
        error.code
    }

    /// Run one update through the chain. Returns when it is committed here and on every successor.
    ///
    /// # Errors
    /// Those of the chain; `Timeout` with `maybe_applied` at the deadline, while the update goes on.
    pub async fn update(
        self: &Arc<Self>,
        job: Job,
        kind: Kind,
        chain_version: u64,
        origin: Origin,
        deadline: Instant,
    ) -> Result<Outcome> {
        let chunk = job.chunk;
        let writer = job.writer.map(writer_of);
        let (send, mut answer) = oneshot::channel();
        let id = {
            let mut machine = self.machine.lock();
            let id = machine.next_request;
            machine.next_request += 1;
            machine.askers.insert(id, send);
            machine.jobs.insert(id, Arc::new(job));
            id
        };
        self.drive(Event::Request(Request { id, chunk, chain_version, kind, writer, origin }));
        let answered = match fs3_rt::timeout_at(deadline, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => {
                self.drive(Event::Expire { id, chunk });
                answer.await
            }
        };
        let result = answered.unwrap_or(Err(Refusal { code: Code::Unavailable, maybe_applied: true }));
        result.map_err(|refusal| self.refused(chunk, refusal))
    }

    fn refused(&self, chunk: ChunkId, refusal: Refusal) -> Error {
        let error = self.error(refusal.code, format!("chunk {chunk} on target {}: {}", self.id, why(refusal.code)));
        if refusal.maybe_applied { error.maybe_applied() } else { error }
    }

    /// Wait until the chunk may be read under this chain version.
    pub async fn admit_read(self: &Arc<Self>, chunk: ChunkId, chain_version: u64, deadline: Instant) -> Result<()> {
        let refused = |code| self.error(code, format!("target {}: {}", self.id, why(code)));
        match self.read_admission(chunk, chain_version) {
            ReadAdmission::Serve => return Ok(()),
            ReadAdmission::Refuse(code) => return Err(refused(code)),
            ReadAdmission::Wait => {}
        }
        let (send, mut answer) = oneshot::channel();
        let id = {
            let mut machine = self.machine.lock();
            let id = machine.next_request;
            machine.next_request += 1;
            machine.readers.insert(id, send);
            id
        };
        self.drive(Event::Read { id, chunk, chain_version });
        let answered = match fs3_rt::timeout_at(deadline, &mut answer).await {
            Ok(answered) => answered,
            Err(_) => {
                self.drive(Event::Expire { id, chunk });
                answer.await
            }
        };
        answered.unwrap_or(Err(Code::Unavailable)).map_err(refused)
    }

    pub fn read_admission(&self, chunk: ChunkId, chain_version: u64) -> ReadAdmission {
        self.machine.lock().replica.read_admission(monotonic_ns(), chunk, chain_version)
    }

    /// Whether the lease still covers an answer.
    pub fn check_reply(&self) -> Result<()> {
        if self.machine.lock().replica.may_reply(monotonic_ns()) {
            return Ok(());
        }
        Err(self.error(Code::NotServing, format!("target {}: {}", self.id, why(Code::NotServing))))
    }

    /// Check a request that concerns the whole target and needs it to serve.
    pub fn check_serving(&self, chain_version: u64) -> Result<()> {
        match self.read_admission(ChunkId { space: u32::MAX, ..ChunkId::default() }, chain_version) {
            ReadAdmission::Refuse(code) => Err(self.error(code, format!("target {}: {}", self.id, why(code)))),
            ReadAdmission::Serve | ReadAdmission::Wait => Ok(()),
        }
    }

    /// Whether a removal of a range was answered already.
    ///
    /// # Errors
    /// `Superseded` when its client has given it up.
    pub fn is_range_removed(&self, writer: WriterRecord) -> Result<bool> {
        let removed = self.machine.lock().replica.is_range_removed(writer_of(writer));
        removed.map_err(|code| self.error(code, format!("target {}: {}", self.id, why(code))))
    }

    /// A removal of a range that began under `chain_version` is about to be answered.
    pub fn range_removed(&self, writer: WriterRecord, chain_version: u64) {
        self.machine.lock().replica.range_removed(writer_of(writer), chain_version);
    }

    pub fn error(&self, code: Code, message: String) -> Error {
        Error::new(code, message).with_routing(self.core.routing().version)
    }

    pub fn view(&self) -> RoutingView {
        self.machine.lock().replica.routing().clone()
    }

    pub fn is_settled(&self) -> bool {
        self.machine.lock().replica.is_settled()
    }

    pub fn mark_synced(&self, to: fs3_core::TargetId, chunk: ChunkId, outcome: Outcome) {
        self.machine.lock().replica.mark_synced(to, chunk, outcome, &StoreView(&self.store));
    }

    /// Those of `chunks` that the syncing successor `to` is not known to hold equal.
    pub fn retain_unsynced(&self, to: fs3_core::TargetId, chunks: &mut Vec<ChunkId>) {
        let machine = self.machine.lock();
        chunks.retain(|chunk| !machine.replica.is_synced(to, *chunk));
    }

    /// What to report. A store that failed takes the target offline.
    pub fn local_state(self: &Arc<Self>) -> (LocalState, Option<String>) {
        if let Some(error) = self.store.failed().filter(|e| e.code == Code::DiskError) {
            self.upkeep.disk.fail(&error);
        }
        if let Some(error) = self.store.failed().or_else(|| self.upkeep.disk.error()) {
            self.life.lock().error.get_or_insert_with(|| error.to_string());
            self.drive(Event::StoreFailed { code: error.code });
        }
        // Lock order: machine before life.
        let failed = self.has_failed();
        let life = self.life.lock();
        match &life.error {
            _ if !failed && !life.ready => {
                let waiting = "waiting for the manager to see the restart";
                let former = life.former_error.as_ref();
                (LocalState::Offline, Some(former.map_or(waiting.into(), |e| format!("{waiting} after: {e}"))))
            }
            error if failed => (LocalState::Offline, error.clone()),
            _ if life.uptodate => (LocalState::Uptodate, None),
            _ => (LocalState::Online, None),
        }
    }

    pub fn has_failed(&self) -> bool {
        self.machine.lock().replica.has_failed()
    }

    /// Take over newer routing. Calls are serialised by the core.
    pub fn reroute(self: &Arc<Self>) {
        let routing = self.core.routing();
        let state = routing.state_of(self.chain_id, self.id);
        use fs3_proto::v1::PublicState as State;
        let known = self.view().chain_version;
        let (view, heal) = {
            let mut life = self.life.lock();
            life.ready |= !matches!(state, State::Serving | State::Syncing | State::Unspecified);
            let view = routing.view(self.chain_id, self.id, life.ready);
            if view.chain_version <= known {
                return;
            }
            let serving = routing.in_state(self.chain_id, State::Serving).len();
            // A head that comes back from the loss of the whole chain looks whether the others have what it has.
            let heal =
                view.role == Role::Serving && view.head && !life.uptodate && serving > 1 && view.chain_version > 1;
            life.uptodate = view.role == Role::Serving;
            life.resyncs.clear();
            (view, heal)
        };
        tracing::info!(target_id = self.id, ?view, "chain changed");
        let (chain_version, syncs) = (view.chain_version, view.successors.iter().any(|s| s.syncing));
        let serves = view.role == Role::Serving;
        self.drive(Event::Routing(view));
        if !serves {
            self.forget_cached();
        }
        self.reroute_kv();
        self.retry_repairs();
        if syncs {
            self.core.spawn(self.clone().resync(chain_version));
        }
        if heal {
            self.core.spawn(self.clone().heal(chain_version));
        }
    }
}

fn update_of(job: &Job, version: u64, chain_version: u64, change: Change, chunk_bytes: u32) -> Update {
    let update_version = UpdateVersion(version);
    Update {
        id: job.chunk,
        chunk_bytes,
        update_version,
        chain_version: ChainVersion(chain_version),
        writer: job.writer.map(|w| WriterRecord { update_version, ..w }),
        change,
    }
}

pub(crate) fn outcome_of(version: &VersionInfo) -> Outcome {
    Outcome {
        update_version: version.update_version.0,
        length: if version.removed { 0 } else { version.length },
        crc: if version.removed { 0 } else { version.chunk_crc32c },
    }
}

/// One line for a person.
pub(crate) fn why(code: Code) -> &'static str {
    match code {
        Code::StaleChain => "the chain has changed; refresh the routing and retry",
        Code::NotServing => "it does not serve this now; refresh the routing or try another replica",
        Code::Busy => "too many requests wait for this chunk; retry later",
        Code::Superseded => "a newer write of the same channel was applied already",
        Code::VersionGap => "an earlier update is missing here",
        Code::NoSpace => "a disk of the chain is full",
        Code::Timeout => "not finished in time",
        Code::PayloadChecksum => "the bytes arrived damaged; send them again",
        Code::Unavailable => "the service is stopping",
        Code::ChecksumMismatch => "stored bytes do not match their checksums; another replica may be right",
        Code::InvalidArgument => "the request does not fit the chunk",
        _ => "the update failed; see the service's log",
    }
}

fn writer_of(record: WriterRecord) -> Writer {
    Writer { client: record.client, channel: record.channel, sequence: record.sequence }
}
