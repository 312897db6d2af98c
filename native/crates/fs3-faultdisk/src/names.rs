//! Name changes since a directory was last synced, so that a power cut can take them back.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::draw::Draw;

enum Change {
    Made { path: PathBuf, directory: bool },
    Renamed { from: PathBuf, to: PathBuf, replaced: Option<PathBuf> },
    // The file waits in the graveyard until its removal is durable.
    Removed { path: PathBuf, grave: PathBuf },
    DirectoryRemoved { path: PathBuf },
}

/// Unsynced name changes, oldest first. The tree itself always shows all of them.
pub(crate) struct Names {
    changes: VecDeque<Change>,
    graveyard: PathBuf,
    graves: u64,
}

impl Names {
    /// Removed files wait in `graveyard`, which is on the file system of the tree, outside of it.
    pub fn new(graveyard: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&graveyard)?;
        Ok(Self { changes: VecDeque::new(), graveyard, graves: 0 })
    }

    /// A file or directory was made at `path`.
    pub fn made(&mut self, path: PathBuf, directory: bool) {
        self.changes.push_back(Change::Made { path, directory });
    }

    fn bury(&mut self, path: &Path) -> io::Result<PathBuf> {
        self.graves += 1;
        let grave = self.graveyard.join(self.graves.to_string());
        fs::rename(path, &grave)?;
        Ok(grave)
    }

    /// Remove a file; returns where it lies until that is durable.
    pub fn remove(&mut self, path: PathBuf) -> io::Result<PathBuf> {
        let grave = self.bury(&path)?;
        self.changes.push_back(Change::Removed { path, grave: grave.clone() });
        Ok(grave)
    }

    /// Remove an empty directory.
    pub fn remove_directory(&mut self, path: PathBuf) -> io::Result<()> {
        fs::remove_dir(&path)?;
        self.changes.push_back(Change::DirectoryRemoved { path });
        Ok(())
    }

    /// Rename, replacing a file at `to`; returns where the replaced one lies.
    pub fn rename(&mut self, from: PathBuf, to: PathBuf) -> io::Result<Option<PathBuf>> {
        let replaced = match fs::symlink_metadata(&to) {
            Ok(there) if !there.is_dir() => Some(self.bury(&to)?),
            _ => None,
        };
        fs::rename(&from, &to)?;
        self.changes.push_back(Change::Renamed { from, to, replaced: replaced.clone() });
        Ok(replaced)
    }

    /// All changes are durable now.
    pub fn synced(&mut self) {
        for change in self.changes.drain(..) {
            if let Change::Removed { grave, .. } | Change::Renamed { replaced: Some(grave), .. } = change {
                let _ = fs::remove_file(grave);
            }
        }
    }

    /// The power is cut: the changes after a random one are lost. Returns how many.
    pub fn cut(&mut self, draw: &mut Draw) -> io::Result<u64> {
        let kept = draw.below(self.changes.len() as u64 + 1) as usize;
        let lost = (self.changes.len() - kept) as u64;
        while self.changes.len() > kept {
            let Some(change) = self.changes.pop_back() else { break };
            undo(change)?;
        }
        self.synced();
        Ok(lost)
    }
}

fn undo(change: Change) -> io::Result<()> {
    match change {
        Change::Made { path, directory: false } => fs::remove_file(path),
        Change::Made { path, directory: true } => fs::remove_dir(path),
        Change::Removed { path, grave } => fs::rename(grave, path),
        Change::DirectoryRemoved { path } => fs::create_dir(path),
        Change::Renamed { from, to, replaced } => {
            fs::rename(&to, &from)?;
            replaced.map_or(Ok(()), |grave| fs::rename(grave, &to))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every cut leaves the tree as it was after some number of changes.
    #[test]
    fn a_cut_leaves_a_prefix_of_the_changes() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let dir = tempfile::tempdir().expect("a directory");
            let root = dir.path().join("tree");
            fs::create_dir(&root).expect("mkdir");
            let mut names = Names::new(dir.path().join("graves")).expect("names");
            fs::write(root.join("a"), "a").expect("write");
            fs::write(root.join("b"), "b").expect("write");
            names.synced();
            names.rename(root.join("a"), root.join("b")).expect("rename");
            names.remove(root.join("b")).expect("remove");
            fs::create_dir(root.join("d")).expect("mkdir");
            names.made(root.join("d"), true);
            let lost = names.cut(&mut Draw::new(seed)).expect("cut");
            let read = |name: &str| fs::read_to_string(root.join(name)).ok();
            let state = (read("a"), read("b"), root.join("d").is_dir());
            let expected = match lost {
                3 => (Some("a".to_owned()), Some("b".to_owned()), false),
                2 => (None, Some("a".to_owned()), false),
                1 => (None, None, false),
                _ => (None, None, true),
            };
            assert_eq!(state, expected, "seed {seed}, {lost} lost");
            assert_eq!(fs::read_dir(dir.path().join("graves")).expect("readdir").count(), 0);
            seen.insert(lost);
        }
        assert_eq!(seen.len(), 4);
    }
}
