//! What an entry of the key-value cache is when it is a chunk: a header, then the value.
//!
//! The header takes whole crc blocks, so that the value's checksums are those of the chunk's blocks.

use crate::CRC_BLOCK_BYTES;

/// The chunk space of such entries; `inode` is that of the namespace's directory.
pub const KV_SPACE: u32 = 1;
/// Most bytes that a header has: what a piece of a value leaves of a chunk.
pub const KV_HEADER_BYTES_MAX: usize = 2 * CRC_BLOCK_BYTES;
/// Longest key that fits into it.
pub const KV_STORED_KEY_BYTES_MAX: usize = KV_HEADER_BYTES_MAX - FIXED_BYTES;

const MAGIC: [u8; 4] = *b"fs3k";
const FORMAT: u32 = 1;
const FIXED_BYTES: usize = 48;

/// What stands before the bytes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvHeader<'a> {
    /// The key, with what clients put before it.
    pub key: &'a [u8],
    /// Which piece of the value this is.
    pub piece: u32,
    /// Bytes of this piece. The chunk may be longer: it keeps the length of a former, longer entry.
    pub length: u32,
    /// Bytes of the whole value.
    pub total: u64,
    /// The client that put it.
    pub writer: u64,
    /// The number that it gave the put; pieces of one value have the same.
    pub sequence: u64,
}

/// Bytes of the header of an entry with such a key.
pub fn kv_header_bytes(key_bytes: usize) -> usize {
    (FIXED_BYTES + key_bytes).next_multiple_of(CRC_BLOCK_BYTES)
}

impl<'a> KvHeader<'a> {
    /// The header as it is stored, with its padding.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(kv_header_bytes(self.key.len()));
        out.extend_from_slice(&MAGIC);
        for word in [FORMAT, self.key.len() as u32, self.piece, self.length, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.total, self.writer, self.sequence] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(self.key);
        out.resize(kv_header_bytes(self.key.len()), 0);
        out
    }

    /// Read the header that `bytes` begin with; `None` for what is none.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if bytes.get(..4)? != MAGIC || u32_at(4)? != FORMAT {
            return None;
        }
        let key_bytes = u32_at(8)? as usize;
        Some(Self {
            key: bytes.get(FIXED_BYTES..FIXED_BYTES.checked_add(key_bytes)?)?,
            piece: u32_at(12)?,
            length: u32_at(16)?,
            total: u64_at(24)?,
            writer: u64_at(32)?,
            sequence: u64_at(40)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(key: &[u8]) -> KvHeader<'_> {
        KvHeader { key, piece: 3, length: 70_000, total: 5 << 32, writer: 7, sequence: u64::MAX }
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for key_bytes in [1, 48, 4048, 4049, KV_STORED_KEY_BYTES_MAX] {
            let key = vec![0xA5; key_bytes];
            let stored = header(&key).encode();
            assert_eq!(stored.len(), kv_header_bytes(key_bytes));
            assert!(stored.len() <= KV_HEADER_BYTES_MAX);
            assert_eq!(KvHeader::decode(&stored), Some(header(&key)));
        }
    }

    #[test]
    fn the_form_on_disk_stays_the_same() {
        let stored = header(b"key").encode();
        assert_eq!(stored.len(), 4096);
        assert_eq!(&stored[..8], b"fs3k\x01\0\0\0");
        assert_eq!(&stored[8..20], b"\x03\0\0\0\x03\0\0\0\x70\x11\x01\0");
        assert_eq!(&stored[40..52], b"\xff\xff\xff\xff\xff\xff\xff\xffkey\0");
    }

    #[test]
    fn nonsense_is_no_header() {
        let stored = header(b"key").encode();
        assert_eq!(KvHeader::decode(&stored[..50]), None);
        assert_eq!(KvHeader::decode(&[0; 4096]), None);
        assert_eq!(KvHeader::decode(&[]), None);
        let mut later = stored.clone();
        later[4] = 2;
        assert_eq!(KvHeader::decode(&later), None);
        let mut long = stored;
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(KvHeader::decode(&long), None);
    }
}
