//! Names in `3fs-virt/iovs`: `<uuid>[.b<block>]` is an iov, `<uuid>.r<depth>.n<entries>…` a ring that reads, `.w` one
//! that writes, with `.p<priority>`, `.t<milliseconds>` and `.f<flags>` behind it where they are not 0.

use crate::layout::{Config, Places};

/// What a name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The id of the iov.
    pub id: [u8; 16],
    /// Bytes that one I/O may not cross; 0: it may lie anywhere.
    pub block_bytes: u64,
    /// Set for a ring.
    pub ring: Option<(Config, Places)>,
}

impl Name {
    /// An iov.
    pub fn iov(id: [u8; 16], block_bytes: u64) -> Self {
        Self { id, block_bytes, ring: None }
    }

    /// A ring.
    pub fn ring(id: [u8; 16], config: Config, places: Places) -> Self {
        Self { id, block_bytes: 0, ring: Some((config, places)) }
    }

    /// As text.
    pub fn encode(&self) -> String {
        let mut text = encode_id(&self.id);
        if self.block_bytes > 0 {
            text += &format!(".b{}", self.block_bytes);
        }
        if let Some((config, places)) = &self.ring {
            let kind = if config.for_read { 'r' } else { 'w' };
            text += &format!(".{kind}{}.n{}", config.io_depth, places.entries);
            let others = [('p', i64::from(config.priority)), ('t', i64::from(config.timeout_ms))];
            for (letter, value) in others.into_iter().filter(|(_, value)| *value != 0) {
                text += &format!(".{letter}{value}");
            }
            if config.flags != 0 {
                text += &format!(".f{}", config.flags);
            }
        }
        text
    }

    /// Of text; `None` when it is no name, or says something twice.
    pub fn decode(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let id = decode_id(parts.next()?)?;
        let mut values: [Option<&str>; 7] = [None; 7];
        for part in parts {
            let letter = part.chars().next()?;
            let at = "brwnptf".find(letter)?;
            if values[at].replace(&part[1..]).is_some() {
                return None;
            }
        }
        let [block, read, write, entries, priority, timeout, flags] = values;
        let (for_read, depth) = match (read, write) {
            (Some(depth), None) => (true, depth),
            (None, Some(depth)) => (false, depth),
            (None, None) if entries.or(priority).or(timeout).or(flags).is_none() => {
                return Some(Self::iov(id, or_zero(block)?));
            }
            _ => return None,
        };
        if block.is_some() {
            return None;
        }
        let config = Config {
            for_read,
            io_depth: depth.parse().ok()?,
            priority: or_zero(priority)?,
            timeout_ms: or_zero(timeout)?,
            flags: or_zero(flags)?,
        };
        Some(Self::ring(id, config, Places::new(entries?.parse().ok()?)?))
    }
}

fn or_zero<T: std::str::FromStr + Default>(value: Option<&str>) -> Option<T> {
    value.map_or(Some(T::default()), |text| text.parse().ok())
}

/// The usual text of a UUID.
pub fn encode_id(id: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in id.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

/// A UUID from its text, with or without dashes.
pub fn decode_id(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    if digits.len() != 32 || (text.len() != 32 && text.len() != 36) {
        return None;
    }
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
        let value = |digit: u8| char::from(digit).to_digit(16);
        *byte = (value(pair[0])? * 16 + value(pair[1])?) as u8;
    }
    Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233-4455-6677-8899-aabbccddeeff";

    #[test]
    fn names_are_read_back_as_they_were_written() {
        let id = decode_id(ID).unwrap();
        assert_eq!(decode_id(&ID.replace('-', "")), Some(id));
        let config = Config { for_read: false, io_depth: -8, priority: -1, timeout_ms: 20, flags: 3 };
        let plain = Config { for_read: true, io_depth: 0, priority: 0, timeout_ms: 0, flags: 0 };
        let places = Places::new(100).unwrap();
        for (name, text) in [
            (Name::iov(id, 0), ID.to_owned()),
            (Name::iov(id, 4096), format!("{ID}.b4096")),
            (Name::ring(id, plain, places), format!("{ID}.r0.n100")),
            (Name::ring(id, config, places), format!("{ID}.w-8.n100.p-1.t20.f3")),
        ] {
            assert_eq!(name.encode(), text);
            assert_eq!(Name::decode(&text), Some(name));
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for suffix in [
            ".",
            ".x1",
            ".b",
            ".b-1",
            ".b1.b1",
            ".r1",
            ".n5",
            ".r1.w1.n5",
            ".r1.n0",
            ".r1.n99999999",
            ".r.n1",
            ".b8.r1.n1",
            ".é",
        ] {
            assert_eq!(Name::decode(&format!("{ID}{suffix}")), None, "{suffix}");
        }
        for id in ["", "0011", "zz112233-4455-6677-8899-aabbccddeeff", "é0112233-4455-6677-8899-aabbccddeef"] {
            assert_eq!(Name::decode(id), None, "{id}");
        }
    }
}
