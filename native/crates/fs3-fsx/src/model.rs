//! What the file ought to hold, and what is said when it does not.

use crate::draw::fill;
use crate::operation::{Kind, Operation};

/// Bytes shown of a difference.
const SHOWN: usize = 16;

/// The reference: plain memory.
#[derive(Default)]
pub(crate) struct Model {
    pub bytes: Vec<u8>,
    /// Position of the first byte in the file.
    pub base: u64,
}

impl Model {
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// `at..at+len` as far as the file goes.
    pub fn slice(&self, at: u64, len: u64) -> &[u8] {
        let length = self.bytes.len() as u64;
        let start = at.saturating_sub(self.base).min(length);
        let end = at.saturating_add(len).saturating_sub(self.base).min(length);
        &self.bytes[start as usize..end.max(start) as usize]
    }

    pub fn resize(&mut self, length: u64) {
        self.bytes.resize((length - self.base) as usize, 0);
    }

    pub fn write(&mut self, at: u64, data: &[u8]) {
        let end = at + data.len() as u64;
        if end > self.end() {
            self.resize(end);
        }
        let start = (at - self.base) as usize;
        self.bytes[start..start + data.len()].copy_from_slice(data);
    }

    /// Zeros as far as the file goes.
    pub fn zero(&mut self, at: u64, len: u64) {
        let zeros = vec![0; self.slice(at, len).len()];
        if !zeros.is_empty() {
            self.write(at, &zeros);
        }
    }

    /// Compare what was read at `at`. `done`: all operations so far, to tell whose bytes are there.
    pub fn compare(&self, what: &str, at: u64, found: &[u8], wanted: &[u8], done: &[Operation]) -> Result<(), String> {
        if found == wanted {
            return Ok(());
        }
        if found.len() != wanted.len() {
            let (have, want) = (found.len(), wanted.len());
            return Err(format!("{what} at {at} returned {have} bytes instead of {want}; the file is {}", self.end()));
        }
        let first = found.iter().zip(wanted).position(|(f, w)| f != w).unwrap_or(0);
        let last = found.iter().zip(wanted).rposition(|(f, w)| f != w).unwrap_or(0);
        let differ = found.iter().zip(wanted).filter(|(f, w)| f != w).count();
        let shown = first..found.len().min(first + SHOWN);
        let place = at + first as u64;
        Err(format!(
            "{what} at {at} of {} bytes: {differ} differ, {place} to {}; the file is {}\n  found    {:02x?}: {}\n  expected {:02x?}: {}",
            found.len(),
            at + last as u64,
            self.end(),
            &found[shown.clone()],
            whose(found[first], place, done),
            &wanted[shown],
            whose(wanted[first], place, done),
        ))
    }
}

/// Which operations wrote `byte` at `place`, the latest of them.
fn whose(byte: u8, place: u64, done: &[Operation]) -> String {
    if byte == 0 {
        return "zero".into();
    }
    let wrote = |o: &Operation| {
        let covers = o.kind == Kind::Append || (o.at <= place && place < o.at.saturating_add(o.len));
        covers && writes(o.kind) && fill(o.arg, place, 1)[0] == byte
    };
    match done.iter().enumerate().rev().find(|(_, o)| wrote(o)) {
        Some((number, operation)) => format!("as operation {number} wrote: {operation}"),
        None => "of no write to this place (a copy, another place, or damage)".into(),
    }
}

fn writes(kind: Kind) -> bool {
    matches!(kind, Kind::Write | Kind::Append | Kind::MapWrite | Kind::MapSync | Kind::DirectWrite)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_the_operation_whose_bytes_were_found() {
        let old = Operation { kind: Kind::Write, at: 0, len: 100, arg: 1 };
        let new = Operation { kind: Kind::Write, at: 40, len: 10, arg: 2 };
        let mut model = Model::default();
        for o in [old, new] {
            model.write(o.at, &fill(o.arg, o.at, o.len as usize));
        }
        let stale = fill(1, 0, 100);
        let error = model.compare("read", 0, &stale, model.slice(0, 200), &[old, new]).unwrap_err();
        assert!(error.contains("10 differ, 40 to 49"), "{error}");
        assert!(error.contains("as operation 0 wrote: write 0 100 1"), "{error}");
        assert!(error.contains("as operation 1 wrote: write 40 10 2"), "{error}");
        assert!(model.compare("read", 0, &model.bytes, model.slice(0, 100), &[old, new]).is_ok());
        assert!(model.compare("read", 0, &stale[..99], model.slice(0, 100), &[old, new]).is_err());
    }

    #[test]
    fn it_grows_and_shrinks_as_a_file_does() {
        let mut model = Model { base: 10, ..Model::default() };
        model.write(12, &[1, 2, 3]);
        assert_eq!(model.bytes, [0, 0, 1, 2, 3]);
        model.zero(13, 100);
        model.resize(16);
        assert_eq!((model.slice(11, 4), model.end()), (&[0, 1, 0, 0][..], 16));
        model.resize(12);
        assert_eq!((model.slice(11, 4), model.slice(50, 5)), (&[0][..], &[][..]));
    }
}
