//! What clients did and what they saw, for the checkers.

/// Values are this many bytes; offsets and lengths of all operations are multiples of it.
pub const VALUE_BYTES: u32 = 8;
/// What a read reports where the bytes are no repetition of one value: a torn or mixed one.
pub const TORN: u64 = u64::MAX;

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded: it took effect between invocation and return.
    Ok,
    /// It failed and certainly had and will have no effect.
    Failed,
    /// It failed, or has not returned: it takes effect at some time after the invocation, or never.
    Unknown,
}

/// Bytes `offset..offset + length` of a chunk, all of one value; 0 where nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
    /// The value, [`TORN`] for bytes that nobody can have written.
    pub value: u64,
}

/// What an operation does to its chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill `offset..offset + length` with a value that no other write of the world has and that is neither 0 nor
    /// [`TORN`]; a gap behind the former end becomes zeros.
    Write {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
        /// The value.
        value: u64,
    },
    /// Read `offset..offset + length`. What the chunk does not have is zeros.
    Read {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
        /// What was seen, in order, without gaps, neighbours of different values; empty unless the read succeeded.
        seen: Vec<Run>,
    },
    /// Cut to `length`; a shorter chunk stays as it is, and so does a chunk that is not there.
    Truncate {
        /// Length in bytes.
        length: u32,
    },
    /// Make `offset..offset + length` zeros; the length stays.
    Punch {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// Remove the chunk: all of it reads as zeros afterwards.
    Remove,
    /// Everything acknowledged on this chunk before survives power loss. A sync that covers several chunks is one
    /// operation on each.
    Sync,
}

/// Something that befell all replicas of a chain at once, so that more is lost than one replica's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Their processes ended: of each chunk the last update may be gone if it was not acknowledged, even though it was
    /// read (replicas prepare and forward at the same time).
    Processes,
    /// They lost power without durable writes: what was not synced may be gone.
    Power,
}

/// One operation of one client. Every attempt that may take effect by itself is an operation of its own; a write repeated
/// under one identity is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The client. A client may have several operations under way.
    pub client: u32,
    /// Number of the chunk in the world.
    pub chunk: u32,
    /// What it does.
    pub kind: Kind,
    /// Virtual time of the invocation, nanoseconds.
    pub invoked_ns: u64,
    /// Virtual time of the return; `None` while it is under way.
    pub returned_ns: Option<u64>,
    /// How it ended; `Unknown` while it is under way.
    pub outcome: Outcome,
    /// The chunk's update version after a write or truncate, or the one that was read, where the service named it.
    pub version: Option<u64>,
}

/// All operations of a world in the order of their invocation.
#[derive(Clone, Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    losses: Vec<(u64, Loss)>,
}

impl History {
    /// An operation begins; returns its number.
    pub fn invoke(&mut self, client: u32, chunk: u32, kind: Kind, now_ns: u64) -> usize {
        self.operations.push(Operation {
            client,
            chunk,
            kind,
            invoked_ns: now_ns,
            returned_ns: None,
            outcome: Outcome::Unknown,
            version: None,
        });
        self.operations.len() - 1
    }

    /// Operation `number` ended.
    pub fn complete(&mut self, number: usize, outcome: Outcome, now_ns: u64) {
        let operation = &mut self.operations[number];
        operation.outcome = outcome;
        operation.returned_ns = Some(now_ns);
    }

    /// The service named the version that operation `number` created or read.
    pub fn set_version(&mut self, number: usize, version: u64) {
        self.operations[number].version = Some(version);
    }

    /// Read `number` ended well and saw `bytes`.
    pub fn complete_read(&mut self, number: usize, bytes: &[u8], now_ns: u64) {
        if let Kind::Read { offset, seen, .. } = &mut self.operations[number].kind {
            *seen = runs_of(*offset, bytes);
        }
        self.complete(number, Outcome::Ok, now_ns);
    }

    /// All replicas failed together at this time.
    pub fn lose(&mut self, now_ns: u64, loss: Loss) {
        self.losses.push((now_ns, loss));
    }

    /// Times and kinds of losses in order of time.
    pub fn losses(&self) -> &[(u64, Loss)] {
        &self.losses
    }

    /// The operations.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// Number of operations that have not returned.
    pub fn under_way(&self) -> usize {
        self.operations.iter().filter(|o| o.returned_ns.is_none()).count()
    }
}

/// The bytes of a write of `value`.
pub fn bytes_of(value: u64, length: u32) -> Vec<u8> {
    value.to_le_bytes().repeat((length / VALUE_BYTES) as usize)
}

/// Runs of equal values in `bytes`, which begin at `offset` of the chunk.
pub fn runs_of(offset: u32, bytes: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (at, word) in bytes.chunks(VALUE_BYTES as usize).enumerate() {
        let value = word.try_into().map_or(TORN, u64::from_le_bytes);
        let offset = offset + at as u32 * VALUE_BYTES;
        match runs.last_mut() {
            Some(run) if run.value == value => run.length += word.len() as u32,
            _ => runs.push(Run { offset, length: word.len() as u32, value }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back_as_runs() {
        let mut bytes = bytes_of(7, 16);
        bytes.extend(bytes_of(9, 8));
        let runs = runs_of(64, &bytes);
        assert_eq!(runs, [Run { offset: 64, length: 16, value: 7 }, Run { offset: 80, length: 8, value: 9 }]);
    }
}
