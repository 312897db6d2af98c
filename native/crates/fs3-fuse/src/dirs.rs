//! Offsets of one open directory. Pure: no I/O.
//!
//! Offset 0 is ".", 1 is "..", then the entries in name order. Only one page of entries is kept, with the name
//! that each earlier page began after, so that memory stays small for any directory and an offset stays valid
//! while entries come and go.

use fs3_client::DirEntry;

/// Entries asked for in one page.
pub(crate) const PAGE_ENTRIES: u32 = 2048;
/// Offset of the first real entry.
pub(crate) const FIRST: u64 = 2;

/// A page to get from the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    index: usize,
    /// Names greater than this one.
    pub after: Vec<u8>,
}

/// What stands at an offset.
#[derive(Debug)]
pub(crate) enum At<'a> {
    /// These entries, the first of them at the offset.
    Entries(&'a [DirEntry]),
    /// Unknown until this page was given to [`DirStream::filled`].
    Fetch(Wanted),
    /// The end of the directory.
    End,
}

#[derive(Default)]
pub(crate) struct DirStream {
    /// Offset of the first entry and the name before it, of every page seen.
    pages: Vec<(u64, Vec<u8>)>,
    current: Option<Page>,
    /// The parent's inode as the service told it; 0 until then.
    pub parent: u64,
}

struct Page {
    index: usize,
    entries: Vec<DirEntry>,
    end: bool,
    with_attr: bool,
}

impl DirStream {
    /// One that goes on where another was: its parent and what [`DirStream::seen`] told of its pages.
    pub fn resumed(parent: u64, pages: Vec<(u64, Vec<u8>)>) -> Self {
        Self { pages, current: None, parent }
    }

    /// The parent, and offset of the first entry and the name before it of every page seen.
    pub fn seen(&self) -> (u64, Vec<(u64, Vec<u8>)>) {
        (self.parent, self.pages.clone())
    }

    /// Start again, as `rewinddir` must: the entries are asked for anew.
    pub fn rewind(&mut self) {
        *self = Self { parent: self.parent, ..Self::default() };
    }

    /// What stands at `offset` (at least [`FIRST`]); `with_attr`: only a page with attributes will do.
    pub fn at(&self, offset: u64, with_attr: bool) -> At<'_> {
        if self.pages.is_empty() {
            return At::Fetch(Wanted { index: 0, after: Vec::new() });
        }
        if let Some(page) = &self.current
            && (page.with_attr || !with_attr)
        {
            let first = self.pages[page.index].0;
            let behind = first + page.entries.len() as u64;
            if offset >= first && offset < behind {
                return At::Entries(&page.entries[(offset - first) as usize..]);
            }
            if offset >= behind && page.end {
                return At::End;
            }
            if offset == behind {
                let after = page.entries.last().map_or_else(Vec::new, |e| e.name.to_vec());
                return At::Fetch(Wanted { index: page.index + 1, after });
            }
        }
        let index = self.pages.partition_point(|(first, _)| *first <= offset).saturating_sub(1);
        // Entries of that page have gone meanwhile: go on with the next page.
        if let Some(page) = &self.current
            && page.index == index
            && (page.with_attr || !with_attr)
        {
            let after = page.entries.last().map_or_else(|| self.pages[index].1.clone(), |e| e.name.to_vec());
            return At::Fetch(Wanted { index: index + 1, after });
        }
        At::Fetch(Wanted { index, after: self.pages[index].1.clone() })
    }

    /// Take a page that was fetched for `wanted` on behalf of `offset`.
    pub fn filled(&mut self, wanted: Wanted, offset: u64, entries: Vec<DirEntry>, end: bool, with_attr: bool) {
        let Wanted { index, after } = wanted;
        if index == self.pages.len() {
            self.pages.push((if index == 0 { FIRST } else { offset }, after));
        }
        // A page without entries ends the directory, whatever the service says: else a reader would not end.
        let end = end || entries.is_empty();
        self.current = Some(Page { index, entries, end, with_attr });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> DirEntry {
        DirEntry { name: name.to_owned().into_bytes().into(), inode: 7, ..Default::default() }
    }

    /// Lists `names` from `offset` with pages of two; returns (offset, name) pairs.
    fn list(stream: &mut DirStream, names: &[&str], mut offset: u64) -> Vec<(u64, String)> {
        let mut seen = Vec::new();
        loop {
            match stream.at(offset, false) {
                At::End => return seen,
                At::Entries(entries) => {
                    for e in entries {
                        seen.push((offset, String::from_utf8(e.name.to_vec()).unwrap()));
                        offset += 1;
                    }
                }
                At::Fetch(wanted) => {
                    let rest: Vec<_> = names.iter().filter(|n| n.as_bytes() > &wanted.after[..]).collect();
                    let page = rest.iter().take(2).map(|n| entry(n)).collect();
                    stream.filled(wanted, offset, page, rest.len() <= 2, false);
                }
            }
        }
    }

    #[test]
    fn every_entry_comes_once_with_a_stable_offset() {
        let mut stream = DirStream::default();
        let names = ["a", "b", "c", "d", "e"];
        let all = list(&mut stream, &names, FIRST);
        assert_eq!(
            all.iter().map(|(o, n)| (*o, n.as_str())).collect::<Vec<_>>(),
            vec![(2, "a"), (3, "b"), (4, "c"), (5, "d"), (6, "e")]
        );
        for start in 0..5 {
            assert_eq!(list(&mut stream, &names, FIRST + start as u64), all[start..]);
        }
        assert!(list(&mut stream, &names, 100).is_empty());
    }

    #[test]
    fn removing_what_was_listed_does_not_lose_the_rest() {
        let mut stream = DirStream::default();
        let names = ["a", "b", "c", "d", "e"];
        let At::Fetch(wanted) = stream.at(FIRST, false) else { panic!("nothing is known yet") };
        stream.filled(wanted, FIRST, vec![entry("a"), entry("b")], false, false);
        assert!(matches!(stream.at(FIRST, false), At::Entries(e) if e.len() == 2));
        let rest = list(&mut stream, &names[2..], FIRST + 2);
        assert_eq!(rest.iter().map(|(_, n)| n.as_str()).collect::<Vec<_>>(), vec!["c", "d", "e"]);
    }

    #[test]
    fn a_rewound_stream_asks_again_and_a_plain_page_does_not_serve_attributes() {
        let mut stream = DirStream::default();
        assert_eq!(list(&mut stream, &["a"], FIRST).len(), 1);
        assert!(matches!(stream.at(FIRST, true), At::Fetch(_)));
        stream.rewind();
        assert_eq!(list(&mut stream, &["a", "b", "c"], FIRST).len(), 3);
    }

    #[test]
    fn a_resumed_stream_goes_on_at_any_offset() {
        let names = ["a", "b", "c", "d", "e"];
        let mut stream = DirStream::default();
        let all = list(&mut stream, &names, FIRST);
        let (parent, pages) = stream.seen();
        for start in 0..5 {
            let mut resumed = DirStream::resumed(parent, pages.clone());
            assert_eq!(list(&mut resumed, &names[..], FIRST + start as u64), all[start..]);
        }
    }

    #[test]
    fn an_empty_directory_ends() {
        assert!(list(&mut DirStream::default(), &[], FIRST).is_empty());
    }
}
