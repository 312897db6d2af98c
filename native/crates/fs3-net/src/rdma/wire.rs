//! What a message by RDMA looks like: a prefix; for frames their header and a tail of descriptors, body and small payload.
//!
//! ```text
//! offset size
//! 0      1    kind
//! 1      1    flags
//! 2      2    credits: receives that the sender has posted again
//! 4      2    sources: pieces of memory that the receiver is to read the payload from
//! 6      2    windows: pieces of memory that the response's payload is to be written to
//! 8      8    id of the request that a revoke, revoked or release is about; 0 in frames
//! 16     40   frame header
//! 56          tail: sources, windows (16 bytes each: address, length, key), body, payload if inline
//! ```
//! All numbers are little-endian. A tail that does not fit is read from the one piece of memory described in its place.

use fs3_core::{Code, Error, Result};
use fs3_proto::frame::{HEADER_BYTES, Header, Limits, PAYLOAD_BYTES_MAX};
use fs3_verbs::Remote;

/// Length of a receive.
pub(crate) const MESSAGE_BYTES: usize = 16 << 10;
/// Payload up to this length travels in the message.
pub(crate) const INLINE_PAYLOAD_BYTES_MAX: usize = 4 << 10;

pub(crate) const PREFIX_BYTES: usize = 16;
pub(crate) const TAIL_AT: usize = PREFIX_BYTES + HEADER_BYTES;
const PIECE_BYTES: usize = 16;

/// The tail is at the one piece of memory described.
pub(crate) const TAIL_REMOTE: u8 = 1;
/// The payload is at the end of the tail.
pub(crate) const PAYLOAD_INLINE: u8 = 2;
/// The payload has been written to the windows of the request.
pub(crate) const PAYLOAD_PUSHED: u8 = 4;
/// The request's windows were revoked, or do not fit: the payload is not sent.
pub(crate) const PAYLOAD_WITHHELD: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Frame = 1,
    /// Only credits.
    Credits = 2,
    /// Do not write to the windows of this request any more, and say so.
    Revoke = 3,
    /// Nothing is written to the windows of this request any more.
    Revoked = 4,
    /// The remote tail of the response to this request has been read.
    Release = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub kind: Kind,
    pub flags: u8,
    pub credits: u16,
    pub sources: u16,
    pub windows: u16,
    pub id: u64,
}

/// Memory of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub at: Remote,
    pub bytes: u32,
}

impl Prefix {
    pub fn control(kind: Kind, id: u64) -> Self {
        Self { kind, flags: 0, credits: 0, sources: 0, windows: 0, id }
    }

    pub fn encode(&self) -> [u8; PREFIX_BYTES] {
        let mut out = [0; PREFIX_BYTES];
        (out[0], out[1]) = (self.kind as u8, self.flags);
        out[2..4].copy_from_slice(&self.credits.to_le_bytes());
        out[4..6].copy_from_slice(&self.sources.to_le_bytes());
        out[6..8].copy_from_slice(&self.windows.to_le_bytes());
        out[8..16].copy_from_slice(&self.id.to_le_bytes());
        out
    }

    pub fn decode(message: &[u8]) -> Result<Self> {
        let bytes: &[u8; PREFIX_BYTES] = message.first_chunk().ok_or_else(|| wrong("is too short"))?;
        let kind = match bytes[0] {
            1 => Kind::Frame,
            2 => Kind::Credits,
            3 => Kind::Revoke,
            4 => Kind::Revoked,
            5 => Kind::Release,
            _ => return Err(wrong("is of an unknown kind")),
        };
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Ok(Self {
            kind,
            flags: bytes[1],
            credits: u16_at(2),
            sources: u16_at(4),
            windows: u16_at(6),
            id: u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes")),
        })
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

impl Piece {
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.at.address.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out.extend(self.at.key.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        Self { at: Remote { address, key: u32_at(12) }, bytes: u32_at(8) }
    }
}

/// The header of a frame, checked.
pub(crate) fn header_of(message: &[u8]) -> Result<Header> {
    let bytes = message.get(PREFIX_BYTES..).and_then(|rest| rest.first_chunk()).ok_or_else(|| wrong("is too short"))?;
    Header::decode(bytes, Limits::AUTHENTICATED)
}

/// Where the tail of a message is, when it is not in it.
pub(crate) fn remote_tail(message: &[u8], prefix: &Prefix, header: &Header) -> Result<Piece> {
    let piece = message.get(TAIL_AT..TAIL_AT + PIECE_BYTES).ok_or_else(|| wrong("has no tail"))?;
    let piece = Piece::decode(piece);
    if piece.bytes as usize != tail_bytes(prefix, header) {
        return Err(wrong("has a tail of the wrong length"));
    }
    Ok(piece)
}

/// Length that the tail of a frame must have.
pub(crate) fn tail_bytes(prefix: &Prefix, header: &Header) -> usize {
    let inline = if prefix.has(PAYLOAD_INLINE) { header.payload_bytes as usize } else { 0 };
    (usize::from(prefix.sources) + usize::from(prefix.windows)) * PIECE_BYTES + header.body_bytes as usize + inline
}

/// A tail, taken apart.
#[derive(Debug)]
pub(crate) struct Tail<'a> {
    pub sources: Vec<Piece>,
    pub windows: Vec<Piece>,
    pub body: &'a [u8],
    pub inline: &'a [u8],
}

impl<'a> Tail<'a> {
    pub fn decode(tail: &'a [u8], prefix: &Prefix, header: &Header) -> Result<Self> {
        if tail.len() != tail_bytes(prefix, header) {
            return Err(wrong("has a tail of the wrong length"));
        }
        let pieces = |bytes: &[u8]| bytes.chunks_exact(PIECE_BYTES).map(Piece::decode).collect::<Vec<_>>();
        let (sources, rest) = tail.split_at(usize::from(prefix.sources) * PIECE_BYTES);
        let (windows, rest) = rest.split_at(usize::from(prefix.windows) * PIECE_BYTES);
        let (body, inline) = rest.split_at(header.body_bytes as usize);
        let this = Self { sources: pieces(sources), windows: pieces(windows), body, inline };
        let described: u64 = this.sources.iter().map(|piece| u64::from(piece.bytes)).sum();
        if !this.sources.is_empty() && described != u64::from(header.payload_bytes) {
            return Err(wrong("describes another payload than it announces"));
        }
        if prefix.has(PAYLOAD_INLINE) && !this.sources.is_empty() || header.payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(wrong("has its payload twice"));
        }
        Ok(this)
    }
}

fn wrong(what: &str) -> Error {
    Error::new(Code::Protocol, format!("a message by RDMA {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(body: u32, payload: u32) -> Header {
        Header {
            kind: fs3_proto::frame::Kind::Request,
            request_id: 9,
            method: 1,
            status: 0,
            deadline_ms: 5,
            body_bytes: body,
            payload_bytes: payload,
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(flags in 0u8..16, credits: u16, windows in 0u16..9, id: u64, body in 0u32..100) {
            let prefix = Prefix { kind: Kind::Frame, flags, credits, sources: 0, windows, id };
            prop_assert_eq!(Prefix::decode(&prefix.encode()).unwrap(), prefix);
            let header = header(body, 3);
            let piece = Piece { at: Remote { address: id, key: 7 }, bytes: u32::from(credits) };
            let mut tail = Vec::new();
            (0..windows).for_each(|_| piece.encode(&mut tail));
            tail.extend(vec![5; body as usize]);
            if prefix.has(PAYLOAD_INLINE) {
                tail.extend([1, 2, 3]);
            }
            let decoded = Tail::decode(&tail, &prefix, &header).unwrap();
            prop_assert_eq!(decoded.windows, vec![piece; windows as usize]);
            prop_assert_eq!((decoded.body.len(), decoded.inline.len()), (body as usize, tail.len() - 16 * windows as usize - body as usize));
        }

        #[test]
        fn nonsense_is_refused_without_panic(message in prop::collection::vec(any::<u8>(), 0..200)) {
            if let (Ok(prefix), Ok(header)) = (Prefix::decode(&message), header_of(&message)) {
                let _ = remote_tail(&message, &prefix, &header);
            }
            if let Ok(prefix) = Prefix::decode(&message) {
                let _ = Tail::decode(&message[PREFIX_BYTES..], &prefix, &header(3, 9));
            }
        }
    }

    #[test]
    fn sources_must_add_up_to_the_payload() {
        let prefix = Prefix { sources: 1, ..Prefix::control(Kind::Frame, 0) };
        let mut tail = Vec::new();
        Piece { at: Remote { address: 1, key: 2 }, bytes: 10 }.encode(&mut tail);
        assert!(Tail::decode(&tail, &prefix, &header(0, 10)).is_ok());
        assert!(Tail::decode(&tail, &prefix, &header(0, 11)).is_err());
    }
}
