//! A replica with its in-memory store and an executor for the machine's effects.

use std::collections::BTreeMap;

use fs3_chain::{
    ChunkState, ChunkView, Config, Content as Which, Effect, Event, OpId, Origin, Outcome, ReadAdmission, Refusal,
    Replica, Request, RequestId, Role, RoutingView, Successor, Writer, WriterRecord,
};
use fs3_core::{ChunkId, Code, TargetId};

use super::manager::{Chain, State};
use super::{Action, Asker, Content, MS, Message, Payload, World, target};

#[derive(Clone, Default)]
pub struct Version {
    pub version: u64,
    pub chain_version: u64,
    /// `None`: removed.
    pub content: Option<Content>,
}

#[derive(Clone, Default)]
pub struct Stored {
    pub committed: Version,
    pending: Option<(Version, Option<Writer>, Option<Vec<WriterRecord>>)>,
    pub writers: Vec<WriterRecord>,
}

#[derive(Clone, Default)]
pub struct Store(pub BTreeMap<ChunkId, Stored>);

pub fn crc(content: &Content) -> u32 {
    content.iter().fold(17, |h, id| h.wrapping_mul(31).wrapping_add(*id as u32))
}

impl ChunkView for Store {
    fn chunk(&self, id: ChunkId) -> ChunkState {
        let Some(stored) = self.0.get(&id) else { return ChunkState::default() };
        let v = &stored.committed;
        let pending = stored.pending.as_ref().map_or(0, |p| p.0.version);
        let (writers, chain_version) = (stored.writers.clone(), v.chain_version);
        match &v.content {
            Some(c) => ChunkState {
                committed: v.version,
                tombstone: 0,
                chain_version,
                length: c.len() as u32,
                crc: crc(c),
                pending,
                writers,
            },
            None => ChunkState { tombstone: v.version, chain_version, pending, writers, ..ChunkState::default() },
        }
    }

    fn pending(&self) -> Vec<ChunkId> {
        self.0.iter().filter(|(_, s)| s.pending.is_some()).map(|(id, _)| *id).collect()
    }
}

impl Store {
    pub fn content(&self, id: ChunkId) -> Option<&Content> {
        self.0.get(&id).and_then(|s| s.committed.content.as_ref())
    }
}

pub enum StoreDone {
    Prepare { op: OpId, chunk: ChunkId, version: u64, content: Which, chain_version: u64 },
    Commit { op: OpId, chunk: ChunkId, version: u64 },
    Abort { op: OpId, chunk: ChunkId, version: u64 },
    Repair { op: OpId, chunk: ChunkId },
}

pub struct Forward {
    op: OpId,
    chunk: ChunkId,
    to: TargetId,
    attempt: u32,
    chain_version: u64,
    version: u64,
    base: u64,
    content: Which,
}

pub struct Node {
    index: usize,
    pub up: bool,
    /// Cut off from the manager and the other nodes.
    pub partitioned: bool,
    /// While partitioned it is reached by clients.
    pub visible: bool,
    /// Raised by every start.
    pub life: u64,
    /// Routing has shown that the manager knows of this life's start.
    pub ready: bool,
    pub uptodate: bool,
    pub store: Store,
    replica: Replica,
    requests: BTreeMap<RequestId, Asker>,
    payloads: BTreeMap<OpId, Message>,
    reads: BTreeMap<RequestId, (ChunkId, usize, u64)>,
    next_request: RequestId,
    pub fatal: Option<Code>,
}

impl Node {
    pub fn new(index: usize) -> Self {
        let config = Config { retry_ns_min: 2 * MS, retry_ns_max: 20 * MS, ..Config::default() };
        Self {
            index,
            up: true,
            partitioned: false,
            visible: false,
            life: 1,
            ready: true,
            uptodate: true,
            store: Store::default(),
            replica: Replica::new(config),
            requests: BTreeMap::new(),
            payloads: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_request: 1,
            fatal: None,
        }
    }

    /// Whether clients do not reach it.
    pub fn is_hidden(&self) -> bool {
        self.partitioned && !self.visible
    }

    pub fn chain_version(&self) -> u64 {
        self.replica.routing().chain_version
    }

    pub fn is_quiet(&self) -> bool {
        self.replica.busy_chunks() == 0
    }

    pub fn describe(&self) -> String {
        let r = self.replica.routing();
        let busy = self.replica.busy_chunks();
        format!("n{} up={} ready={} {r:?} busy={busy} fatal={:?}", self.index, self.up, self.ready, self.fatal)
    }
}

impl World {
    pub fn crash(&mut self, node: usize) {
        self.nodes[node].up = false;
    }

    pub fn restart(&mut self, node: usize) {
        let old = &mut self.nodes[node];
        if old.up {
            return;
        }
        let store = std::mem::take(&mut old.store);
        let (life, partitioned) = (old.life + 1, old.partitioned);
        *old = Node { life, partitioned, store, ready: false, uptodate: false, ..Node::new(node) };
        self.after(0, Action::Heartbeat { node });
    }

    fn step(&mut self, node: usize, event: Event) {
        let n = &mut self.nodes[node];
        if self.trace {
            eprintln!("{:>12} n{node} <- {event:?}", self.now);
        }
        let effects = n.replica.step(self.now, event, &n.store);
        if self.trace {
            effects.iter().for_each(|e| eprintln!("{:>12} n{node} -> {e:?}", self.now));
        }
        for effect in effects {
            self.carry_out(node, effect);
        }
    }

    fn carry_out(&mut self, node: usize, effect: Effect) {
        let life = self.nodes[node].life;
        let slow = self.rng.chance(self.options.slow_disk_percent);
        let disk = 50_000 + self.rng.below(if slow { 60 * MS } else { 4 * MS });
        match effect {
            Effect::Prepare { op, chunk, version, content } => {
                let chain_version = self.nodes[node].chain_version();
                let done = StoreDone::Prepare { op, chunk, version, content, chain_version };
                self.after(disk, Action::StoreDone { node, life, done });
            }
            Effect::Commit { op, chunk, version } => {
                self.after(disk, Action::StoreDone { node, life, done: StoreDone::Commit { op, chunk, version } });
            }
            Effect::Abort { op, chunk, version } => {
                self.after(disk, Action::StoreDone { node, life, done: StoreDone::Abort { op, chunk, version } });
            }
            Effect::Forward { op, chunk, to, attempt, chain_version, version, base, content, delay_ns } => {
                let forward = Forward { op, chunk, to, attempt, chain_version, version, base, content };
                self.after(delay_ns, Action::SendForward { node, life, forward });
            }
            Effect::Reply { id, result } => self.reply(node, id, result),
            Effect::ServeRead { id } => {
                if let Some((chunk, client, call)) = self.nodes[node].reads.remove(&id) {
                    self.serve_read(node, chunk, client, call);
                }
            }
            Effect::Done { op } => {
                self.nodes[node].payloads.remove(&op);
            }
            Effect::Repair { op, chunk } => {
                self.after(5 * disk, Action::StoreDone { node, life, done: StoreDone::Repair { op, chunk } });
            }
            // A head whose base is rotten and whose successor died before it could be asked.
            Effect::Fatal { code: Code::ChecksumMismatch, .. } if self.rots => {
                self.crash(node);
                self.after(20 * MS, Action::Restart { node });
            }
            Effect::Fatal { chunk, code } => panic!("replica {node} gave up at {chunk}: {code:?}"),
        }
    }

    fn reply(&mut self, node: usize, id: RequestId, result: Result<Outcome, Refusal>) {
        if let Some((_, client, call)) = self.nodes[node].reads.remove(&id) {
            let code = result.expect_err("reads are not answered with an outcome").code;
            if let Some(delay) = self.delay() {
                self.after(delay, Action::ReadAnswer { client, call, result: Err(code) });
            }
            return;
        }
        let asker = self.nodes[node].requests.remove(&id).expect("a request is answered once");
        let client = matches!(asker, Asker::Client { .. });
        if let Asker::Predecessor { node: to, .. } = asker
            && self.is_cut(node, to)
        {
            return;
        }
        if self.nodes[node].is_hidden() || (self.nodes[node].partitioned && !client) {
            return;
        }
        if let Some(delay) = self.delay() {
            self.after(delay, Action::Answer { asker, from: node, result });
        }
    }

    pub fn deliver(&mut self, node: usize, message: Message, asker: Asker) {
        if !self.nodes[node].up {
            return;
        }
        let origin = match message.forward {
            Some((version, base, replace)) => Origin::Forward { version, base, replace },
            None => Origin::Client,
        };
        self.ask(node, message, origin, asker);
    }

    pub fn ask(&mut self, node: usize, message: Message, origin: Origin, asker: Asker) {
        let n = &mut self.nodes[node];
        let id = n.next_request;
        n.next_request += 1;
        n.requests.insert(id, asker);
        let (chunk, life) = (message.chunk, n.life);
        let request = Request {
            id,
            chunk,
            chain_version: message.chain_version,
            kind: message.kind(),
            writer: message.writer,
            origin,
        };
        n.payloads.insert(id, message);
        self.step(node, Event::Request(request));
        self.after(60 * MS, Action::Expire { node, life, id, chunk });
    }

    pub fn expire(&mut self, node: usize, life: u64, id: RequestId, chunk: ChunkId) {
        if self.nodes[node].up && self.nodes[node].life == life {
            self.step(node, Event::Expire { id, chunk });
        }
    }

    pub fn deliver_read(&mut self, node: usize, chunk: ChunkId, chain_version: u64, client: usize, call: u64) {
        if !self.nodes[node].up {
            return;
        }
        match self.nodes[node].replica.read_admission(self.now, chunk, chain_version) {
            ReadAdmission::Serve => self.serve_read(node, chunk, client, call),
            ReadAdmission::Refuse(code) => self.after(MS, Action::ReadAnswer { client, call, result: Err(code) }),
            ReadAdmission::Wait => {
                let n = &mut self.nodes[node];
                let id = n.next_request;
                n.next_request += 1;
                n.reads.insert(id, (chunk, client, call));
                self.step(node, Event::Read { id, chunk, chain_version });
                let life = self.nodes[node].life;
                self.after(60 * MS, Action::Expire { node, life, id, chunk });
            }
        }
    }

    fn serve_read(&mut self, node: usize, chunk: ChunkId, client: usize, call: u64) {
        let n = &self.nodes[node];
        let result = match n.store.0.get(&chunk) {
            _ if !n.replica.may_reply(self.now) => Err(Code::NotServing),
            Some(s) => Ok((s.committed.version, s.committed.content.clone().unwrap_or_default())),
            None => Ok((0, Vec::new())),
        };
        if self.trace {
            eprintln!("{:>12} n{node} shows client {client} {chunk} {result:?}", self.now);
        }
        if let Some(delay) = self.delay().filter(|_| !self.nodes[node].is_hidden()) {
            self.after(delay, Action::ReadAnswer { client, call, result });
        }
    }

    pub fn store_done(&mut self, node: usize, life: u64, done: StoreDone) {
        if !self.nodes[node].up || self.nodes[node].life != life {
            return;
        }
        let event = match done {
            StoreDone::Prepare { op, chunk, version, content, chain_version } => {
                let result = self.prepare(node, op, chunk, (version, chain_version), content);
                Event::Prepared { op, chunk, result }
            }
            StoreDone::Commit { op, chunk, version } => {
                let stored = self.nodes[node].store.0.get_mut(&chunk).expect("a prepared chunk is there");
                let (pending, writer, writers) = stored.pending.take().expect("a pending version to commit");
                assert_eq!(pending.version, version, "the prepared version is committed");
                if let Some(writers) = writers {
                    stored.writers = writers;
                }
                if let Some(writer) = writer {
                    let other = |r: &WriterRecord| r.writer.client != writer.client;
                    stored.writers.retain(other);
                    stored.writers.push(WriterRecord { writer, update_version: version });
                }
                stored.committed = pending;
                Event::Committed { op, chunk, result: Ok(()) }
            }
            StoreDone::Abort { op, chunk, version } => {
                if let Some(stored) = self.nodes[node].store.0.get_mut(&chunk) {
                    stored.pending.take_if(|p| p.0.version == version);
                }
                Event::Aborted { op, chunk }
            }
            StoreDone::Repair { op, chunk } => {
                assert!(self.nodes[node].store.chunk(chunk).pending == 0, "nothing is prepared during a repair");
                Event::Repaired { op, chunk, result: Ok(()) }
            }
        };
        self.step(node, event);
    }

    fn prepare(
        &mut self,
        node: usize,
        op: OpId,
        chunk: ChunkId,
        (version, chain_version): (u64, u64),
        content: Which,
    ) -> Result<Outcome, Code> {
        // What was left pending by an earlier life has no payload but itself.
        let message = self.nodes[node].payloads.get(&op).cloned();
        let payload = Payload::Mirror;
        let message = message.unwrap_or(Message { chunk, chain_version, payload, writer: None, forward: None });
        let needs_base = matches!(message.payload, Payload::Append(_)) && matches!(content, Which::Update);
        let (after, writers) = match content {
            Which::Fetched { from, outcome } => {
                let other = &self.nodes[(from.0 - 1) as usize];
                let theirs = other.store.chunk(chunk);
                let content = other.store.content(chunk).cloned();
                let is_this = match (&message.payload, &content) {
                    (Payload::Append(id), Some(content)) => content.last() == Some(id),
                    _ => true,
                };
                if !other.up || theirs.committed != version || theirs.crc != outcome.crc || !is_this {
                    return Err(Code::ChecksumMismatch);
                }
                (content, None)
            }
            _ if needs_base && self.rng.chance(self.options.rot_percent) => return Err(Code::ChecksumMismatch),
            _ => whole(&self.nodes[node].store, chunk, &message.payload, content),
        };
        let n = &mut self.nodes[node];
        let stored = n.store.0.entry(chunk).or_default();
        let outcome = match &after {
            Some(c) => Outcome { update_version: version, length: c.len() as u32, crc: crc(c) },
            None => Outcome { update_version: version, length: 0, crc: 0 },
        };
        stored.pending = Some((Version { version, chain_version, content: after }, message.writer, writers));
        Ok(outcome)
    }

    pub fn send_forward(&mut self, node: usize, life: u64, f: Forward) {
        let n = &self.nodes[node];
        if !n.up || n.life != life || !n.replica.forward_is_current(f.op, f.chunk, f.to, f.attempt) {
            return;
        }
        let own = n.payloads.get(&f.op).cloned();
        let writer = own.as_ref().and_then(|m| m.writer).filter(|_| f.content != Which::Committed);
        let (payload, replace) = match (f.content, own.map(|m| m.payload)) {
            (_, Some(Payload::Remove)) => (Payload::Remove, false),
            (Which::Update, Some(payload)) => (payload, false),
            (which, payload) => {
                let (after, writers) = whole(&n.store, f.chunk, &payload.unwrap_or(Payload::Mirror), which);
                match after {
                    Some(after) => {
                        let writers = writers.unwrap_or_else(|| n.store.chunk(f.chunk).writers);
                        (Payload::Whole(after, writers), true)
                    }
                    None => (Payload::Remove, false),
                }
            }
        };
        let message = Message {
            chunk: f.chunk,
            chain_version: f.chain_version,
            payload,
            writer,
            forward: Some((f.version, f.base, replace)),
        };
        let asker = Asker::Predecessor { node, life, op: f.op, chunk: f.chunk, attempt: f.attempt };
        let to = (f.to.0 - 1) as usize;
        self.send(Some(node), to, &message, asker);
        self.after(30 * MS, Action::Timeout { asker, from: to });
    }

    pub fn answered(&mut self, asker: Asker, from: usize, result: Result<Outcome, Refusal>) {
        match asker {
            Asker::Client { client, call } => self.client_write_done(client, call, result),
            Asker::Predecessor { node, life, op, chunk, attempt } => {
                if self.nodes[node].up && self.nodes[node].life == life {
                    let result = result.map_err(|r| r.code);
                    self.step(node, Event::Forwarded { op, chunk, to: target(from), attempt, result });
                }
            }
            Asker::Nobody => {}
        }
    }

    pub fn heartbeat_accepted(&mut self, node: usize, life: u64, sent_ns: u64) {
        if self.nodes[node].up && self.nodes[node].life == life {
            self.step(node, Event::Lease { serve_until_ns: sent_ns + super::LEASE_NS / 2 });
        }
    }

    pub fn reroute(&mut self, node: usize, chain: Chain) {
        if !self.nodes[node].up || chain.version <= self.nodes[node].chain_version() {
            return;
        }
        let state = chain.state(node);
        let n = &mut self.nodes[node];
        n.ready |= !matches!(state, State::Serving | State::Syncing);
        let serving = chain.serving();
        let syncing = chain.syncing();
        let at = serving.iter().position(|s| *s == node);
        let role = match state {
            _ if !n.ready => Role::Idle,
            State::Serving => Role::Serving,
            State::Syncing => Role::Syncing,
            _ => Role::Idle,
        };
        let successor = |s: &usize, syncing| Successor { target: target(*s), syncing };
        let successors = match at {
            Some(at) if at + 1 < serving.len() => vec![successor(&serving[at + 1], false)],
            Some(_) => syncing.iter().map(|s| successor(s, true)).collect(),
            None => Vec::new(),
        };
        let last = role == Role::Serving && at == Some(serving.len().saturating_sub(1));
        let heal = role == Role::Serving && !n.uptodate && at == Some(0) && serving.len() > 1;
        n.uptodate = role == Role::Serving;
        let view = RoutingView { chain_version: chain.version, role, head: at == Some(0), successors };
        self.step(node, Event::Routing(view));
        let life = self.nodes[node].life;
        if last && !syncing.is_empty() {
            self.after(5 * MS, Action::Resync { node, life, chain_version: chain.version });
        }
        if heal {
            // It takes a while to find out what differs, and clients do not wait for that.
            let delay = self.rng.below(30) * MS;
            self.after(delay, Action::Heal { node, life, chain_version: chain.version, serving });
        }
    }

    /// The head came back from the crash of the whole chain: chunks that differ are written again.
    pub fn heal_replicas(&mut self, head: usize, chain_version: u64, serving: &[usize]) {
        for index in 0..super::CHUNKS {
            let chunk = super::chunk_id(index);
            let state = |n: &usize| {
                let s = self.nodes[*n].store.chunk(chunk);
                (s.committed, s.crc, s.pending, s.tombstone)
            };
            let mine = state(&head);
            let others: Vec<_> = serving.iter().map(state).collect();
            if others.iter().any(|o| (o.0, o.1) != (mine.0, mine.1) || o.2 != 0) {
                let above = others.iter().map(|o| o.0.max(o.2).max(o.3)).max().unwrap_or(0);
                let here = mine.0 > 0 || (mine.2 > 0);
                let payload = if here { Payload::Mirror } else { Payload::Remove };
                let message = Message { chunk, chain_version, payload, writer: None, forward: None };
                self.ask(head, message, Origin::Heal { above }, Asker::Nobody);
            }
        }
    }

    pub fn resync(&mut self, node: usize, life: u64, chain_version: u64) {
        let n = &self.nodes[node];
        if !n.up || n.life != life || n.chain_version() != chain_version {
            return;
        }
        self.after(80 * MS, Action::Resync { node, life, chain_version });
        let syncing: Vec<TargetId> =
            self.nodes[node].replica.routing().successors.iter().filter(|s| s.syncing).map(|s| s.target).collect();
        for to in syncing {
            let other = (to.0 - 1) as usize;
            let reachable = self.nodes[other].up && self.nodes[other].chain_version() == chain_version;
            let cut = self.nodes[other].partitioned || self.nodes[node].partitioned || self.is_cut(node, other);
            if !reachable || cut {
                continue;
            }
            let mut differing = Vec::new();
            for index in 0..super::CHUNKS {
                let chunk = super::chunk_id(index);
                let (mine, theirs) = (self.nodes[node].store.chunk(chunk), self.nodes[other].store.chunk(chunk));
                let key = |s: &ChunkState| (s.committed, s.length, s.crc);
                if key(&mine) != key(&theirs) || theirs.pending != 0 {
                    differing.push(chunk);
                }
            }
            // One pass without a difference is the end; each pass repairs what it found.
            if differing.is_empty() && self.nodes[node].replica.is_settled() {
                self.manager_resync_done(other, chain_version);
            }
            for chunk in differing {
                let message = Message { chunk, chain_version, payload: Payload::Mirror, writer: None, forward: None };
                self.ask(node, message, Origin::Resync { to }, Asker::Nobody);
            }
        }
    }
}

/// Content after an update, and the records that replace the chunk's.
fn whole(
    store: &Store,
    chunk: ChunkId,
    payload: &Payload,
    which: Which,
) -> (Option<Content>, Option<Vec<WriterRecord>>) {
    let committed = store.content(chunk).cloned();
    match payload {
        _ if which == Which::Committed => (committed, None),
        Payload::Append(id) => {
            let mut content = committed.unwrap_or_default();
            content.push(*id);
            (Some(content), None)
        }
        Payload::Whole(content, writers) => (Some(content.clone()), Some(writers.clone())),
        Payload::Remove => (None, None),
        Payload::Mirror => (committed, None),
    }
}
