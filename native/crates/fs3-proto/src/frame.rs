//! The frame codec: a 40-byte little-endian header, a protobuf body, a raw payload.
//!
//! The layout is stated in `proto/fs3/v1/frame.proto`; `tests/golden/frames.json` holds it for both languages.

use crate::v1;
use fs3_core::{Code, Error, Result, crc32c};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"FS3F";
/// The one protocol version there is.
pub const VERSION: u8 = 1;
/// Size of the header.
pub const HEADER_BYTES: usize = 40;
/// Largest protobuf body.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Largest payload.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;
/// Most references that stand for the payload of one frame.
pub const REFERENCES_MAX: usize = 4096;
/// Flag of a frame whose payload is in memory that the receiver has mapped.
const FLAG_REFERENCES: u16 = 1;
/// Flag beside that: the sender still copies the payload there.
const FLAG_COPYING: u16 = 2;
/// Flag beside that: the last reference is of the payload's checksums, and no part of it.
const FLAG_CRCS: u16 = 4;
/// Largest whole frame (header, body, payload) from a peer whose hello has not been accepted.
pub const UNAUTHENTICATED_BYTES_MAX: usize = 64 << 10;

/// Direction of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Asks for something.
    Request = 1,
    /// Answers the request of the same id.
    Response = 2,
}

/// How large a frame may be; checked before anything is allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest body in bytes.
    pub body_bytes_max: usize,
    /// Largest payload in bytes.
    pub payload_bytes_max: usize,
    /// Largest sum of header, body and payload in bytes.
    pub frame_bytes_max: usize,
}

impl Limits {
    /// For a peer whose hello was accepted.
    pub const AUTHENTICATED: Self = Self {
        body_bytes_max: BODY_BYTES_MAX,
        payload_bytes_max: PAYLOAD_BYTES_MAX,
        frame_bytes_max: HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX,
    };
    /// For a peer that has not said an accepted hello.
    pub const UNAUTHENTICATED: Self = Self {
        body_bytes_max: UNAUTHENTICATED_BYTES_MAX,
        payload_bytes_max: UNAUTHENTICATED_BYTES_MAX,
        frame_bytes_max: UNAUTHENTICATED_BYTES_MAX,
    };
}

/// The fixed part of a frame. `method` and `status` may be numbers this version does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request or response.
    pub kind: Kind,
    /// Chosen by the requester, echoed by the response.
    pub request_id: u64,
    /// A number of `fs3.v1.Method`, echoed by the response.
    pub method: u16,
    /// A number of `fs3.v1.Code`; 0 in requests and in successful responses.
    pub status: u16,
    /// Milliseconds the requester will still wait; 0 in responses.
    pub deadline_ms: u32,
    /// Length of the protobuf body.
    pub body_bytes: u32,
    /// Length of the payload.
    pub payload_bytes: u32,
}

impl Header {
    /// The wire form.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[8..16].copy_from_slice(&self.request_id.to_le_bytes());
        out[16..18].copy_from_slice(&self.method.to_le_bytes());
        out[18..20].copy_from_slice(&self.status.to_le_bytes());
        out[20..24].copy_from_slice(&self.deadline_ms.to_le_bytes());
        out[24..28].copy_from_slice(&self.body_bytes.to_le_bytes());
        out[28..32].copy_from_slice(&self.payload_bytes.to_le_bytes());
        let crc = crc32c(&out[..36]);
        out[36..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The wire form of a frame in which references stand for the payload.
    pub fn encode_by_reference(&self, references: References) -> [u8; HEADER_BYTES] {
        let mut out = self.encode();
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = FLAG_REFERENCES | flag(references.copying, FLAG_COPYING) | flag(references.crcs, FLAG_CRCS);
        out[6..8].copy_from_slice(&flags.to_le_bytes());
        out[32..36].copy_from_slice(&references.count.to_le_bytes());
        let crc = crc32c(&out[..36]);
        out[36..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Parse and check a header.
    ///
    /// # Errors
    /// `Protocol` when the bytes are no valid header of this version; `MessageTooBig` when a valid header
    /// announces more than `limits` allow. Nothing after a refused header can be understood: the connection
    /// must be closed.
    pub fn decode(bytes: &[u8; HEADER_BYTES], limits: Limits) -> Result<Self> {
        let header = Self::parse(bytes)?;
        header.check_limits(limits)?;
        Ok(header)
    }

    /// [`Header::decode`] without limits, for a server that wants to name the request it refuses as too big.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self> {
        match Self::parse_by_reference(bytes)? {
            (header, None) => Ok(header),
            (_, Some(_)) => Err(protocol("a frame has flags that this connection has not agreed on")),
        }
    }

    /// As [`Header::parse`], on a connection with shared memory. With the header come the references when these stand for
    /// the payload.
    pub fn parse_by_reference(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, Option<References>)> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..4] != MAGIC {
            return Err(protocol("the peer does not speak the fs3 frame protocol (bad magic)"));
        }
        if bytes[4] != VERSION {
            return Err(protocol("the peer speaks an unknown version of the frame protocol"));
        }
        if u32_at(36) != crc32c(&bytes[..36]) {
            return Err(protocol("a frame header was damaged on the way (bad checksum)"));
        }
        let kind = match bytes[5] {
            1 => Kind::Request,
            2 => Kind::Response,
            _ => return Err(protocol("a frame is neither request nor response")),
        };
        let references = match (u16_at(6), u32_at(32)) {
            (0, 0) => None,
            (flags, count) if flags & !(FLAG_COPYING | FLAG_CRCS) == FLAG_REFERENCES => {
                if !(1..=REFERENCES_MAX as u32).contains(&count) {
                    return Err(protocol("a frame has no or too many references"));
                }
                Some(References { count, copying: flags & FLAG_COPYING != 0, crcs: flags & FLAG_CRCS != 0 })
            }
            _ => return Err(protocol("a frame has flags that this version does not know")),
        };
        let header = Self {
            kind,
            request_id: u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")),
            method: u16_at(16),
            status: u16_at(18),
            deadline_ms: u32_at(20),
            body_bytes: u32_at(24),
            payload_bytes: u32_at(28),
        };
        match kind {
            Kind::Request if header.status != 0 => Err(protocol("a request carries a status")),
            Kind::Response if header.deadline_ms != 0 => Err(protocol("a response carries a deadline")),
            Kind::Response if header.status != 0 && header.payload_bytes != 0 => {
                Err(protocol("an error response carries a payload"))
            }
            _ => Ok((header, references)),
        }
    }

    /// Refuse with `MessageTooBig` what is larger than `limits`.
    pub fn check_limits(&self, limits: Limits) -> Result<()> {
        let (body, payload) = (self.body_bytes as usize, self.payload_bytes as usize);
        let fits = body <= limits.body_bytes_max
            && payload <= limits.payload_bytes_max
            && HEADER_BYTES + body + payload <= limits.frame_bytes_max;
        if fits {
            return Ok(());
        }
        let message = format!(
            "a frame of {body} + {payload} bytes is over the limit of {} + {} bytes",
            limits.body_bytes_max, limits.payload_bytes_max
        );
        Err(Error::new(Code::MessageTooBig, message))
    }
}

/// What stands for a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct References {
    /// How many ([`Reference`]), 1 to [`REFERENCES_MAX`].
    pub count: u32,
    /// Whether the sender still copies the payload to where they point.
    pub copying: bool,
    /// Whether the last is of the payload's checksums: CRC32C of each 4 KiB, little-endian one after another.
    pub crcs: bool,
}

/// A part of a payload, in memory of the sender that the receiver has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Where it begins, from the start of that memory.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u32,
}

impl Reference {
    /// Length of the wire form.
    pub const BYTES: usize = 16;

    /// The wire form.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0u8; Self::BYTES];
        out[..8].copy_from_slice(&self.offset.to_le_bytes());
        out[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    /// Parse the wire form, of [`Reference::BYTES`].
    pub fn decode(wire: &[u8]) -> Self {
        Self {
            offset: u64::from_le_bytes(wire[..8].try_into().expect("eight bytes")),
            bytes: u32::from_le_bytes(wire[8..12].try_into().expect("four bytes")),
        }
    }

    /// Parse references that stand for a payload of `payload_bytes`.
    ///
    /// # Errors
    /// `Protocol` when they do not add up to that.
    pub fn decode_all(wire: &[u8], payload_bytes: usize) -> Result<Vec<Self>> {
        let all: Vec<Self> = wire.chunks_exact(Self::BYTES).map(Self::decode).collect();
        if all.iter().map(|one| u64::from(one.bytes)).sum::<u64>() != payload_bytes as u64 {
            return Err(protocol("references do not add up to the payload"));
        }
        Ok(all)
    }
}

fn protocol(message: &'static str) -> Error {
    Error::new(Code::Protocol, message)
}

/// The wire form of an error. `retryable` is derived from the code.
pub fn error_to_detail(error: &Error) -> v1::ErrorDetail {
    v1::ErrorDetail {
        code: i32::from(error.code as u16),
        message: error.message.to_string(),
        retryable: error.retryable(),
        maybe_applied: error.maybe_applied,
        routing_version: error.routing_version,
        primary: String::new(),
    }
}

/// The error that a peer reported. Code numbers of a newer peer become `Internal`.
pub fn error_from_detail(detail: v1::ErrorDetail) -> Error {
    let code = Code::from_wire(u16::try_from(detail.code).unwrap_or(0));
    Error {
        code,
        message: detail.message.into(),
        maybe_applied: detail.maybe_applied,
        routing_version: detail.routing_version,
    }
}

/// The error in a response with this non-zero `status` and `body`. The header's status decides the code, so an
/// unreadable or empty body still gives a useful error.
pub fn error_from_response(status: u16, body: &[u8]) -> Error {
    let detail = <v1::ErrorDetail as prost::Message>::decode(body).unwrap_or_default();
    let mut error = error_from_detail(v1::ErrorDetail { code: i32::from(status), ..detail });
    if error.message.is_empty() {
        error.message = format!("the peer answered with status {status}").into();
    }
    error
}
