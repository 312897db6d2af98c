//! Clients: each writes and reads one thing at a time and repeats a write until it knows the answer.

use fs3_chain::{Outcome, Refusal, Writer};
use fs3_core::{ChunkId, ClientId, Code};

use super::{Action, Asker, CHUNKS, Content, MS, Message, Payload, World, chunk_id};

#[derive(Debug)]
pub struct Client {
    index: usize,
    call: u64,
    sequence: u64,
    doing: Option<Doing>,
}

#[derive(Clone, Debug)]
enum Doing {
    Write { chunk: ChunkId, id: u64, sequence: u64, remove: bool },
    Read { chunk: ChunkId, floor: u64, removes: u64 },
}

impl Client {
    pub fn new(index: usize) -> Self {
        Self { index, call: 0, sequence: 0, doing: None }
    }
    pub fn is_idle(&self) -> bool {
        self.doing.is_none()
    }
}

impl World {
    pub fn client_tick(&mut self, client: usize) {
        if self.clients[client].doing.is_none() {
            if self.healing {
                return;
            }
            let chunk = chunk_id(self.rng.below(u64::from(CHUNKS)) as u32);
            let doing = if self.rng.chance(50) {
                let (floor, removes) = self.history.read_begins(chunk);
                Doing::Read { chunk, floor, removes }
            } else {
                self.clients[client].sequence += 1;
                let sequence = self.clients[client].sequence;
                let id = (client as u64 + 1) * 1_000_000 + sequence;
                let remove = self.options.removes && self.rng.chance(15);
                self.history.write_begins(chunk, id, remove);
                Doing::Write { chunk, id, sequence, remove }
            };
            self.clients[client].doing = Some(doing);
        }
        self.client_call(client);
    }

    fn client_call(&mut self, client: usize) {
        let c = &mut self.clients[client];
        c.call += 1;
        let call = c.call;
        let doing = c.doing.clone().expect("a client that calls does something");
        let writer_client = ClientId([c.index as u8; 16]);
        // Now and then the routing is an old one.
        let newest = self.manager.chains.len() - 1;
        let back = usize::from(self.rng.chance(10)).min(newest);
        let chain = self.manager.chains[newest - back].clone();
        let chain_version = chain.version;
        let serving = chain.serving();
        self.after(
            (40 + self.rng.0 % 30) * MS,
            Action::Answer {
                asker: Asker::Client { client, call },
                from: 0,
                result: Err(Refusal { code: Code::Timeout, maybe_applied: true }),
            },
        );
        if serving.is_empty() {
            return;
        }
        match doing {
            Doing::Write { chunk, id, sequence, remove } => {
                let payload = if remove { Payload::Remove } else { Payload::Append(id) };
                let writer = (!remove).then_some(Writer { client: writer_client, channel: 1, sequence });
                let message = Message { chunk, chain_version, payload, writer, forward: None };
                self.send(None, serving[0], &message, Asker::Client { client, call });
            }
            Doing::Read { chunk, .. } => {
                let to = serving[self.rng.below(serving.len() as u64) as usize];
                if let Some(delay) = self.delay().filter(|_| !self.nodes[to].is_hidden()) {
                    self.after(delay, Action::DeliverRead { to, chunk, chain_version, client, call });
                }
            }
        }
    }

    pub fn client_write_done(&mut self, client: usize, call: u64, result: Result<Outcome, Refusal>) {
        if self.clients[client].call != call {
            return;
        }
        self.clients[client].call += 1;
        match (self.clients[client].doing.clone(), result) {
            (Some(Doing::Write { chunk, id, remove, .. }), Ok(outcome)) => {
                self.history.write_acked(chunk, id, outcome.update_version, remove);
                self.clients[client].doing = None;
            }
            // Only possible after the chunk was removed meanwhile, or for an earlier call that came late.
            (Some(Doing::Write { .. }), Err(r)) if r.code == Code::Superseded => {
                panic!("a client with one write at a time is never superseded")
            }
            _ => {}
        }
        let pause = (1 + self.rng.below(20)) * MS;
        self.after(pause, Action::ClientTick { client });
    }

    pub fn client_read_done(&mut self, client: usize, call: u64, result: Result<(u64, Content), Code>) {
        if self.clients[client].call != call {
            return;
        }
        self.clients[client].call += 1;
        if let (Some(Doing::Read { chunk, floor, removes }), Ok((version, content))) =
            (self.clients[client].doing.clone(), result)
        {
            self.history.read_ends(chunk, floor, removes, version, &content);
            self.clients[client].doing = None;
        } else if self.healing {
            self.clients[client].doing = None;
        }
        let pause = (1 + self.rng.below(10)) * MS;
        self.after(pause, Action::ClientTick { client });
    }
}
