//! What the machine keeps of a chunk while something is going on with it.

use std::collections::VecDeque;

use fs3_core::{Code, TargetId};

use crate::types::{Content, Kind, OpId, Outcome, Request, RequestId};

/// An update in flight.
pub(crate) struct Op {
    pub id: OpId,
    pub kind: Kind,
    /// The request to answer; taken when it was answered.
    pub waiter: Option<RequestId>,
    /// The waiter is a client, so that the lease is checked before the reply.
    pub client: bool,
    /// Resync of one target: dropped when the chain changes.
    pub resync_to: Option<TargetId>,
    pub version: u64,
    pub base: u64,
    /// The whole content is prepared and forwarded.
    pub replace: bool,
    pub local: Local,
    pub legs: Vec<Leg>,
    pub phase: Phase,
    pub rewrites: u32,
    /// The content was asked of a successor, because the bytes to build on are rotten here.
    pub fetched: bool,
    /// Begun under an earlier chain version or life: a replica that has left since may have shown it.
    pub carried_over: bool,
    /// Forwarded only when it has been prepared here.
    pub held_back: bool,
}

/// The local half of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// Nothing to prepare.
    None,
    Preparing,
    Ready(Outcome),
    Failed(Code),
}

/// Where an update stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A pending version left by an earlier life is being committed before it is mirrored.
    Recovering,
    /// Prepare and forwards are running.
    Working,
    Committing,
    /// Rotten bytes are being put right. It has no version, so chain changes do not concern it.
    Repairing,
    /// The pending version is being dropped, then the request is refused with this.
    Aborting(Code),
    /// Given up by a chain change; waits only for its prepare or abort to end.
    Zombie,
}

/// The forward to one successor.
pub(crate) struct Leg {
    pub to: TargetId,
    pub syncing: bool,
    pub state: LegState,
    pub attempt: u32,
    /// An earlier attempt may have been applied.
    pub uncertain: bool,
    /// Attempts that arrived damaged.
    pub damaged: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LegState {
    Running,
    Acked(Outcome),
    Refused(Code),
}

/// A chunk with something going on.
#[derive(Default)]
pub(crate) struct Chunk {
    pub active: Option<Op>,
    pub queue: VecDeque<Request>,
    pub readers: Vec<RequestId>,
    /// An update was given up by a chain change and its upstream has not sent it again yet.
    pub orphan: bool,
}

impl Op {
    /// What to prepare locally.
    pub fn content(&self) -> Content {
        match self.kind {
            Kind::Mirror => Content::Committed,
            _ if self.replace => Content::Whole,
            _ => Content::Update,
        }
    }
}

impl Chunk {
    pub fn is_idle(&self) -> bool {
        self.active.is_none() && self.queue.is_empty() && self.readers.is_empty() && !self.orphan
    }
}

/// A refusal before which nothing was changed, and which another attempt would meet again.
pub(crate) fn is_definite(code: Code) -> bool {
    matches!(
        code,
        Code::NoSpace | Code::InvalidArgument | Code::FileTooLarge | Code::MessageTooBig | Code::NotSupported
    )
}
