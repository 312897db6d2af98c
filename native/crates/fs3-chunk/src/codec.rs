//! The bytes of log records: little-endian fields, and a frame that tells a torn or stale record.

use fs3_core::{AlignedBuf, ChunkId, ClientId, Region, UpdateVersion, crc32c};

use crate::{BLOCK_BYTES, Location, WriterRecord};

/// Bytes before the payload of a framed record: u32 length, u32 checksum of position and payload.
pub const FRAME_HEADER_BYTES: usize = 8;

fn frame_crc(position: u64, payload: &[u8]) -> u32 {
    crc32c(payload) ^ crc32c(&position.to_le_bytes())
}

/// Append a framed record to `out`, for log position `position`; `fill` writes its payload.
pub fn frame(position: u64, out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    fill(out);
    let payload = &out[start + FRAME_HEADER_BYTES..];
    let (len, crc) = (payload.len() as u32, frame_crc(position, payload));
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// The payload of the framed record that `bytes`, lying at log position `position`, begins with; `None` at
/// the end of what was written, or where it is torn or left over from another position.
pub fn unframe(position: u64, bytes: &[u8]) -> Option<&[u8]> {
    let header = bytes.get(..FRAME_HEADER_BYTES)?;
    let len = u32::from_le_bytes(header[..4].try_into().ok()?) as usize;
    let crc = u32::from_le_bytes(header[4..].try_into().ok()?);
    let payload = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES.checked_add(len)?)?;
    (len > 0 && frame_crc(position, payload) == crc).then_some(payload)
}

pub(crate) struct Writer<'a>(pub &'a mut Vec<u8>);

impl Writer<'_> {
    pub fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub fn id(&mut self, id: ChunkId) {
        self.0.extend_from_slice(&id.to_bytes());
    }

    pub fn location(&mut self, at: Option<Location>) {
        self.u8(at.map_or(0, |at| at.class));
        self.u32(at.map_or(0, |at| at.index));
    }

    pub fn crcs(&mut self, crcs: &[u32]) {
        self.u32(crcs.len() as u32);
        self.0.reserve(crcs.len() * 4);
        crcs.iter().for_each(|&crc| self.u32(crc));
    }

    pub fn block(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), BLOCK_BYTES as usize);
        self.0.extend_from_slice(bytes);
    }

    pub fn writers(&mut self, records: &[WriterRecord]) {
        self.u8(records.len() as u8);
        for r in records {
            self.0.extend_from_slice(&r.client.0);
            self.u32(r.channel);
            self.u64(r.sequence);
            self.u64(r.update_version.0);
            self.u64(r.time_ms as u64);
        }
    }
}

pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub fn id(&mut self) -> Option<ChunkId> {
        ChunkId::from_bytes(self.take(ChunkId::BYTES)?)
    }

    pub fn location(&mut self) -> Option<Option<Location>> {
        let (class, index) = (self.u8()?, self.u32()?);
        let at = Location { class, index };
        if class == 0 {
            return Some(None);
        }
        at.is_valid().then_some(Some(at))
    }

    pub fn crcs(&mut self) -> Option<Vec<u32>> {
        let count = self.u32()? as usize;
        let bytes = self.take(count.checked_mul(4)?)?;
        fs3_core::unpack_crcs(bytes)
    }

    pub fn block(&mut self) -> Option<Region> {
        let bytes = self.take(BLOCK_BYTES as usize)?;
        let mut buf = AlignedBuf::new(bytes.len());
        buf.copy_from_slice(bytes);
        Some(Region::from_aligned(buf, bytes.len()))
    }

    pub fn writers(&mut self) -> Option<Vec<WriterRecord>> {
        let count = self.u8()?;
        (0..count)
            .map(|_| {
                Some(WriterRecord {
                    client: ClientId(self.take(16)?.try_into().ok()?),
                    channel: self.u32()?,
                    sequence: self.u64()?,
                    update_version: UpdateVersion(self.u64()?),
                    time_ms: self.u64()? as i64,
                })
            })
            .collect()
    }
}
