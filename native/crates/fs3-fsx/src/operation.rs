//! One operation, as text and back.

use std::fmt;
use std::str::FromStr;

/// What is done. The comment says what `at`, `len` and `arg` of the [`Operation`] are, where they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// `pread`.
    Read,
    /// `pwrite`; `arg`: its stamp.
    Write,
    /// `write` with O_APPEND; `arg`: its stamp; `at` is not used.
    Append,
    /// Read through a shared mapping: what is behind the end of the file in its last page, too.
    MapRead,
    /// Write through a shared mapping, as far as the file is long; `arg`: its stamp.
    MapWrite,
    /// As `MapWrite`, then `msync(MS_SYNC)`.
    MapSync,
    /// `pread` with O_DIRECT, aligned.
    DirectRead,
    /// `pwrite` with O_DIRECT, aligned; `arg`: its stamp.
    DirectWrite,
    /// `at`: the new length; `arg`: 0 `ftruncate`, 1 `truncate` by name.
    Truncate,
    /// `fallocate`; `arg`: 1 keeps the length.
    Allocate,
    /// `FALLOC_FL_PUNCH_HOLE`.
    Punch,
    /// `FALLOC_FL_ZERO_RANGE`; `arg`: 1 keeps the length.
    Zero,
    /// `copy_file_range` within the file; `arg`: where to.
    Copy,
    /// `SEEK_DATA` and `SEEK_HOLE` from `at`, after `fsync`.
    Seek,
    /// `arg`: 0 `fsync`, 1 `fdatasync`, 2 `msync` of the lasting mapping.
    Sync,
    /// `posix_fadvise(POSIX_FADV_DONTNEED)`: what is clean is read anew.
    Forget,
    /// Close and open; `arg`: bits of [`Reopen`].
    Reopen,
    /// The other mount goes on with the file; `arg`: bits of [`Reopen`].
    Switch,
    /// Read and compare the whole file.
    Whole,
}

/// How a file is opened again.
pub(crate) struct Reopen;

impl Reopen {
    /// An O_APPEND descriptor stays open beside.
    pub const APPEND: u64 = 1;
    /// An O_DIRECT descriptor stays open beside.
    pub const DIRECT: u64 = 2;
    /// A shared mapping of the file as it is now stays, and is used as far as it goes.
    pub const MAP: u64 = 4;
    /// `fsync` before: when another mount takes over, the descriptors and the mapping of this one stay open meanwhile.
    pub const SYNC: u64 = 8;
    /// The new descriptor is opened before the old ones are closed.
    pub const OVERLAP: u64 = 16;
    /// All bits.
    pub const ALL: u64 = 31;
}

pub(crate) const NAMES: [(Kind, &str); 19] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Append, "append"),
    (Kind::MapRead, "mapread"),
    (Kind::MapWrite, "mapwrite"),
    (Kind::MapSync, "mapsync"),
    (Kind::DirectRead, "directread"),
    (Kind::DirectWrite, "directwrite"),
    (Kind::Truncate, "truncate"),
    (Kind::Allocate, "allocate"),
    (Kind::Punch, "punch"),
    (Kind::Zero, "zero"),
    (Kind::Copy, "copy"),
    (Kind::Seek, "seek"),
    (Kind::Sync, "sync"),
    (Kind::Forget, "forget"),
    (Kind::Reopen, "reopen"),
    (Kind::Switch, "switch"),
    (Kind::Whole, "whole"),
];

/// An operation that says all about itself, so that a sequence may lose some and still make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operation {
    pub kind: Kind,
    pub at: u64,
    pub len: u64,
    pub arg: u64,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(kind, _)| *kind == self.kind).map_or("?", |(_, name)| name);
        write!(f, "{name} {} {} {}", self.at, self.len, self.arg)
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(_, other)| *other == name);
        found.map(|(kind, _)| *kind).ok_or_else(|| format!("no operation is called {name:?}"))
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, at, len, arg] = words[..] else {
            return Err(format!("{line:?}: an operation is NAME AT LENGTH ARGUMENT"));
        };
        let number = |word: &str| word.parse::<u64>().map_err(|e| format!("{line:?}: {word:?}: {e}"));
        Ok(Self { kind: name.parse()?, at: number(at)?, len: number(len)?, arg: number(arg)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_read_back_from_its_text() {
        for (kind, _) in NAMES {
            let operation = Operation { kind, at: 1, len: 1 << 40, arg: 3 };
            assert_eq!(operation.to_string().parse(), Ok(operation));
        }
        for bad in ["", "read 1 2", "read 1 2 x", "wrote 1 2 3"] {
            assert!(bad.parse::<Operation>().is_err());
        }
    }
}
