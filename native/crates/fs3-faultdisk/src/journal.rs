//! What a file has been through since it was last synced, so that a power cut can take it back.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::draw::Draw;

/// A disk writes this much or nothing.
const SECTOR: usize = 512;
/// Unsynced bytes kept per file; what is older counts as written back by the kernel.
const JOURNAL_BYTES_MAX: usize = 64 << 20;

/// How unsynced changes fared in a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Losses {
    /// Changes that reached the disk in time.
    pub kept: u64,
    /// Changes that did not.
    pub lost: u64,
    /// Writes of which some sectors did.
    pub torn: u64,
    /// Name changes that did not reach the disk.
    pub names_lost: u64,
}

impl Losses {
    /// Add up.
    pub fn add(&mut self, other: Losses) {
        self.kept += other.kept;
        self.lost += other.lost;
        self.torn += other.torn;
        self.names_lost += other.names_lost;
    }
}

struct Change {
    at: u64,
    // What the bytes were: shorter than `new` at the end of the file; longer when the file was cut.
    old: Vec<u8>,
    new: Vec<u8>,
    len_before: u64,
    len_after: u64,
}

/// The unsynced changes of one file, oldest first. The file itself always shows all of them.
#[derive(Default)]
pub(crate) struct Journal {
    changes: VecDeque<Change>,
    bytes: usize,
}

impl Journal {
    /// Write `data` at `at`.
    pub fn write(&mut self, file: &File, data: &[u8], at: u64) -> io::Result<()> {
        let len_before = file.metadata()?.len();
        let old = read_upto(file, at, data.len().min(len_before.saturating_sub(at) as usize))?;
        file.write_all_at(data, at)?;
        let len_after = len_before.max(at + data.len() as u64);
        self.push(Change { at, old, new: data.to_vec(), len_before, len_after });
        Ok(())
    }

    /// Cut or extend the file to `len` bytes.
    pub fn set_len(&mut self, file: &File, len: u64) -> io::Result<()> {
        let len_before = file.metadata()?.len();
        let old = read_upto(file, len, len_before.saturating_sub(len) as usize)?;
        file.set_len(len)?;
        self.push(Change { at: len, old, new: vec![], len_before, len_after: len });
        Ok(())
    }

    fn push(&mut self, change: Change) {
        self.bytes += change.old.len() + change.new.len();
        self.changes.push_back(change);
        while self.bytes > JOURNAL_BYTES_MAX && self.changes.len() > 1 {
            let Some(oldest) = self.changes.pop_front() else { break };
            self.bytes -= oldest.old.len() + oldest.new.len();
        }
    }

    /// Everything is durable now.
    pub fn synced(&mut self) {
        self.changes.clear();
        self.bytes = 0;
    }

    /// A sync failed and the kernel dropped the dirty pages: what was not synced is gone although the machine runs.
    pub fn drop_unsynced(&mut self, file: &File) -> io::Result<()> {
        while let Some(change) = self.changes.pop_back() {
            undo(file, &change)?;
        }
        self.bytes = 0;
        Ok(())
    }

    /// Whether everything is durable.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The power is cut: every unsynced change is kept, lost or torn on its own.
    pub fn cut(&mut self, file: &File, draw: &mut Draw) -> io::Result<Losses> {
        let mut losses = Losses::default();
        for change in self.changes.iter().rev() {
            undo(file, change)?;
        }
        for change in std::mem::take(&mut self.changes) {
            match draw.below(4) {
                0 => losses.lost += 1,
                1 if change.new.len() > SECTOR => {
                    tear(file, &change, draw)?;
                    losses.torn += 1;
                }
                _ => {
                    keep(file, &change)?;
                    losses.kept += 1;
                }
            }
        }
        self.bytes = 0;
        file.sync_data()?;
        Ok(losses)
    }
}

fn read_upto(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn undo(file: &File, change: &Change) -> io::Result<()> {
    file.set_len(change.len_before)?;
    file.write_all_at(&change.old, change.at)
}

fn keep(file: &File, change: &Change) -> io::Result<()> {
    file.write_all_at(&change.new, change.at)?;
    let len = file.metadata()?.len();
    let cut = change.len_after < change.len_before;
    if cut && len > change.len_after || !cut && len < change.len_after {
        file.set_len(change.len_after)?;
    }
    Ok(())
}

/// Keep sectors on their own, as a disk may that reorders; sectors are those of the file.
fn tear(file: &File, change: &Change, draw: &mut Draw) -> io::Result<()> {
    let mut done = 0;
    while done < change.new.len() {
        let at = change.at + done as u64;
        let end = (done + SECTOR - (at % SECTOR as u64) as usize).min(change.new.len());
        if draw.below(2) == 0 {
            file.write_all_at(&change.new[done..end], at)?;
        }
        done = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(file: &File) -> Vec<u8> {
        let len = file.metadata().expect("metadata").len() as usize;
        read_upto(file, 0, len).expect("read")
    }

    #[test]
    fn what_was_synced_survives_every_cut() {
        for seed in 0..200 {
            let file = tempfile::tempfile().expect("a file");
            let mut journal = Journal::default();
            journal.write(&file, &[1; 3000], 0).expect("write");
            journal.write(&file, &[2; 1000], 4000).expect("write");
            journal.synced();
            let durable = content(&file);
            journal.write(&file, &[3; 2000], 5000).expect("write");
            journal.set_len(&file, 9000).expect("grow");
            journal.cut(&file, &mut Draw::new(seed)).expect("cut");
            assert_eq!(content(&file)[..5000], durable[..5000], "seed {seed}");
        }
    }

    #[test]
    fn unsynced_writes_are_kept_lost_and_torn_at_sectors() {
        let mut sum = Losses::default();
        for seed in 0..200 {
            let file = tempfile::tempfile().expect("a file");
            let mut journal = Journal::default();
            journal.write(&file, &[1; 4096], 0).expect("write");
            journal.synced();
            journal.write(&file, &[2; 2048], 1024).expect("write");
            sum.add(journal.cut(&file, &mut Draw::new(seed)).expect("cut"));
            let bytes = content(&file);
            assert_eq!(bytes.len(), 4096);
            for sector in bytes.chunks(SECTOR) {
                assert!(sector.iter().all(|&b| b == sector[0]), "seed {seed}: a sector is whole");
            }
        }
        assert!(sum.kept > 20 && sum.lost > 20 && sum.torn > 20, "{sum:?}");
    }

    #[test]
    fn a_failed_sync_that_drops_pages_takes_the_file_back() {
        let file = tempfile::tempfile().expect("a file");
        let mut journal = Journal::default();
        journal.write(&file, b"abcdef", 0).expect("write");
        journal.synced();
        journal.write(&file, b"XY", 5).expect("write");
        journal.set_len(&file, 3).expect("cut");
        journal.write(&file, b"Z", 0).expect("write");
        journal.drop_unsynced(&file).expect("drop");
        assert_eq!(content(&file), b"abcdef");
        assert!(journal.is_empty());
    }

    #[test]
    fn the_oldest_changes_are_written_back_when_too_many_gather() {
        let file = tempfile::tempfile().expect("a file");
        let mut journal = Journal::default();
        let piece = vec![7; 16 << 20];
        for i in 0..6 {
            journal.write(&file, &piece, i * piece.len() as u64).expect("write");
        }
        assert!(journal.bytes <= JOURNAL_BYTES_MAX);
        journal.drop_unsynced(&file).expect("drop");
        assert_eq!(content(&file).len(), 2 * piece.len());
    }
}
