use crate::{Code, Error, Region, Result};
use std::sync::LazyLock;

/// Bytes that one stored checksum covers.
pub const CRC_BLOCK_BYTES: usize = 4096;

/// CRC32C (Castagnoli) of `data`.
pub fn crc32c(data: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(crc) = crate::folded::crc32c(data) {
        return crc;
    }
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, data) as u32
}

/// CRC32C of two pieces one after the other, of their checksums and the length of the second.
pub fn crc32c_join(first: u32, second: u32, second_bytes: usize) -> u32 {
    let (first, second) = (u64::from(first), u64::from(second));
    crc_fast::checksum_combine(crc_fast::CrcAlgorithm::Crc32Iscsi, first, second, second_bytes as u64) as u32
}

/// CRC32C of whole blocks one after the other, of their checksums.
pub fn crc32c_of_blocks(crcs: impl IntoIterator<Item = u32>) -> u32 {
    crcs.into_iter().fold(0, |before, crc| BEHIND_A_BLOCK.apply(before) ^ crc)
}

/// What a block behind some bytes makes of their checksum, beside its own: a linear map of 32 bits, by bytes of it.
struct Behind([[u32; 256]; 4]);

static BEHIND_A_BLOCK: LazyLock<Behind> = LazyLock::new(|| Behind::of(CRC_BLOCK_BYTES));

impl Behind {
    fn of(bytes: usize) -> Self {
        let of_byte = |place: usize| std::array::from_fn(|byte| crc32c_join((byte as u32) << (8 * place), 0, bytes));
        Self(std::array::from_fn(of_byte))
    }

    fn apply(&self, crc: u32) -> u32 {
        crc.to_le_bytes().iter().zip(&self.0).fold(0, |sum, (byte, table)| sum ^ table[*byte as usize])
    }
}

/// Checksums of `data`, cut at the crc-block borders of a chunk in which it begins at `offset`.
/// The first and the last piece may be partial.
pub fn crc_blocks(offset: usize, data: &[u8]) -> Vec<u32> {
    let mut crcs = Vec::with_capacity(data.len() / CRC_BLOCK_BYTES + 2);
    let first = (CRC_BLOCK_BYTES - offset % CRC_BLOCK_BYTES).min(data.len());
    if first > 0 && first < CRC_BLOCK_BYTES {
        crcs.push(crc32c(&data[..first]));
        crcs.extend(data[first..].chunks(CRC_BLOCK_BYTES).map(crc32c));
    } else {
        crcs.extend(data.chunks(CRC_BLOCK_BYTES).map(crc32c));
    }
    crcs
}

/// Check `data` (beginning at `offset` of its chunk) against the checksums of its pieces.
pub fn verify_crcs(offset: usize, data: &[u8], crcs: &[u32]) -> Result<()> {
    if crc_blocks(offset, data) == crcs {
        Ok(())
    } else {
        Err(Error::new(Code::ChecksumMismatch, "the bytes do not match their checksums"))
    }
}

/// Bytes of a chunk that match the checksums of their pieces. Only a check makes one, so that whoever is handed
/// one need not read the bytes again.
#[derive(Clone)]
pub struct CheckedBytes {
    offset: u32,
    data: Region,
    crcs: Vec<u32>,
}

impl CheckedBytes {
    /// Check `data`, beginning at `offset` of its chunk. The bytes must not change from now on.
    ///
    /// Errors: PayloadChecksum.
    pub fn check(offset: u32, data: Region, crcs: Vec<u32>) -> Result<Self> {
        let made = crc_blocks(offset as usize, &data);
        Self::compare(offset, data, &made, crcs)
    }

    /// As [`CheckedBytes::check`], with the checksums that were `made` of `data` already, while it came.
    pub fn compare(offset: u32, data: Region, made: &[u32], crcs: Vec<u32>) -> Result<Self> {
        if made != crcs {
            return Err(Error::new(Code::PayloadChecksum, "the bytes arrived damaged; send them again"));
        }
        Ok(Self { offset, data, crcs })
    }

    /// Bytes that were made here, with their checksums.
    pub fn new(offset: u32, data: Region) -> Self {
        let crcs = crc_blocks(offset as usize, &data);
        Self { offset, data, crcs }
    }

    /// Where they begin, in bytes from the start of the chunk.
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// Where they end, in bytes from the start of the chunk.
    pub fn end(&self) -> u32 {
        self.offset + self.data.len() as u32
    }

    /// The bytes.
    pub fn data(&self) -> &Region {
        &self.data
    }

    /// Checksums of the pieces cut at the crc-block borders of the chunk.
    pub fn crcs(&self) -> &[u32] {
        &self.crcs
    }
}

/// The wire form of checksums: little-endian u32 one after another.
pub fn pack_crcs(crcs: &[u32]) -> Vec<u8> {
    crcs.iter().flat_map(|c| c.to_le_bytes()).collect()
}

/// Parse the wire form; `None` when the length is not a multiple of 4.
pub fn unpack_crcs(bytes: &[u8]) -> Option<Vec<u32>> {
    if !bytes.len().is_multiple_of(4) {
        return None;
    }
    Some(bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_pieces_make_that_of_the_whole() {
        let data: Vec<u8> = (0..3 * CRC_BLOCK_BYTES + 77).map(|i| (i * 31 / 5) as u8).collect();
        for at in [0, 1, 4095, 4096, 10_000, data.len()] {
            assert_eq!(crc32c_join(crc32c(&data[..at]), crc32c(&data[at..]), data.len() - at), crc32c(&data));
        }
        for blocks in 0..=3 {
            let whole = &data[..blocks * CRC_BLOCK_BYTES];
            assert_eq!(crc32c_of_blocks(crc_blocks(0, whole)), crc32c(whole));
        }
    }

    #[test]
    fn only_bytes_that_match_count_as_checked() {
        let data = Region::from_vec((0..10_000u32).map(|i| (i * 7) as u8).collect());
        let made = CheckedBytes::new(100, data.clone());
        let mut crcs = made.crcs().to_vec();
        assert_eq!(CheckedBytes::check(100, data.clone(), crcs.clone()).unwrap().end(), 10_100);
        assert!(CheckedBytes::check(101, data.clone(), crcs.clone()).is_err());
        assert!(CheckedBytes::compare(100, data.clone(), made.crcs(), crcs.clone()).is_ok());
        assert!(CheckedBytes::compare(100, data.clone(), &crcs[1..], crcs.clone()).is_err());
        crcs[1] ^= 1;
        let code = CheckedBytes::check(100, data, crcs).err().map(|e| e.code);
        assert_eq!(code, Some(Code::PayloadChecksum));
    }

    #[test]
    fn crc32c_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn pieces_follow_the_block_borders_of_the_chunk() {
        let data = vec![7u8; 10_000];
        let crcs = crc_blocks(4000, &data);
        assert_eq!(
            crcs,
            vec![crc32c(&data[..96]), crc32c(&data[96..4192]), crc32c(&data[4192..8288]), crc32c(&data[8288..])]
        );
        assert!(verify_crcs(4000, &data, &crcs).is_ok());
        assert!(verify_crcs(4001, &data, &crcs).is_err());
        assert!(crc_blocks(0, &[]).is_empty());
    }
}
