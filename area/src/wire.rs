//! The words by which a process registers an area: one packet there, one back. Values and their bytes.
//!
//! The packet has two descriptors with it, the memory's file and the table's. The answer comes when the area was adopted,
//! or says why it was not. After that the connection carries nothing: it is open for as long as the area is registered, and
//! whoever closes it has no frame of the area in hand any more.
//!
//! ```text
//! to the keeper       8 magic "LLFREEAR" | 4 version | 4 huge frames | 64 name, zeroes behind it
//! back                4 status | up to 252 text
//! ```

/// The version of these words and of what they stand for: the table's layout, the marks behind it, what states mean.
pub const VERSION: u32 = 1;
/// Bytes of a registration.
pub const REGISTRATION: usize = 80;
/// Bytes of the longest answer.
pub const ANSWER: usize = 256;
/// Bytes of the longest name.
pub const NAME: usize = 64;

const MAGIC: &[u8; 8] = b"LLFREEAR";

/// What a process says about its area.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// Its size.
    pub huge_frames: u32,
    /// What it is called: letters, digits and `-_.`, no more than [`NAME`].
    pub name: String,
}

/// Why bytes are no registration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Too few, too many, or something else altogether.
    #[error("this is no registration")]
    Malformed,
    /// Of another release.
    #[error("registrations of version {0}; this is version {VERSION}")]
    Version(u32),
    /// A name that files and commands could not have.
    #[error("a name has 1 to {NAME} letters, digits, hyphens, dots and underscores, the first a letter or digit")]
    Name,
}

impl Registration {
    /// As bytes.
    ///
    /// # Errors
    /// [`WireError::Name`].
    pub fn to_bytes(&self) -> Result<[u8; REGISTRATION], WireError> {
        if !is_name(&self.name) {
            return Err(WireError::Name);
        }
        let mut bytes = [0; REGISTRATION];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.huge_frames.to_le_bytes());
        bytes[16..16 + self.name.len()].copy_from_slice(self.name.as_bytes());
        Ok(bytes)
    }

    /// From bytes that anybody may have sent.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes: &[u8; REGISTRATION] = bytes.try_into().map_err(|_| WireError::Malformed)?;
        let (head, name) = bytes.split_at(16);
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if &head[..8] != MAGIC {
            return Err(WireError::Malformed);
        }
        if number(8) != VERSION {
            return Err(WireError::Version(number(8)));
        }
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
        let name = std::str::from_utf8(&name[..end]).map_err(|_| WireError::Name)?.to_owned();
        if !is_name(&name) || bytes[16 + end..].iter().any(|byte| *byte != 0) {
            return Err(WireError::Name);
        }
        Ok(Self { huge_frames: number(12), name })
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=NAME).contains(&name.len()) && name.bytes().all(plain) && name.as_bytes()[0].is_ascii_alphanumeric()
}

/// The answer to a registration: adopted, or why not.
#[must_use]
pub fn answer(result: Result<(), &str>) -> Vec<u8> {
    let (status, text) = match result {
        Ok(()) => (0u32, ""),
        Err(text) => (1, text),
    };
    let mut bytes = status.to_le_bytes().to_vec();
    let mut end = text.len().min(ANSWER - 4);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes.extend_from_slice(&text.as_bytes()[..end]);
    bytes
}

/// Reads an answer; `None` for bytes that are none.
#[must_use]
pub fn read_answer(bytes: &[u8]) -> Option<Result<(), String>> {
    let (status, text) = bytes.split_first_chunk::<4>()?;
    Some(match u32::from_le_bytes(*status) {
        0 => Ok(()),
        _ => Err(llfree_base::printable(&String::from_utf8_lossy(text))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_survives_its_bytes() {
        for name in ["a", "web-1.python_3", &"n".repeat(NAME)] {
            let registration = Registration { huge_frames: 0x0102_0304, name: name.to_owned() };
            let bytes = registration.to_bytes().expect("a name");
            assert_eq!(Registration::from_bytes(&bytes), Ok(registration));
        }
        let golden = Registration { huge_frames: 512, name: "x".to_owned() }.to_bytes().expect("a name");
        assert_eq!(&golden[..18], b"LLFREEAR\x01\0\0\0\0\x02\0\0x\0");
    }

    #[test]
    fn other_bytes_are_refused() {
        let good = Registration { huge_frames: 1, name: "x".to_owned() }.to_bytes().expect("a name");
        assert_eq!(Registration::from_bytes(&good[..79]), Err(WireError::Malformed));
        assert_eq!(Registration::from_bytes(&[]), Err(WireError::Malformed));
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            Registration::from_bytes(&bytes)
        };
        assert_eq!(with(0, b'l'), Err(WireError::Malformed));
        assert_eq!(with(8, 2), Err(WireError::Version(2)));
        for (at, byte) in [(16, 0), (16, b'/'), (16, b'.'), (16, 0xff), (20, b'y')] {
            assert_eq!(with(at, byte), Err(WireError::Name));
        }
        for name in ["", "a/b", "-x", &"n".repeat(65)] {
            Registration { huge_frames: 1, name: name.to_owned() }.to_bytes().expect_err(name);
        }
    }

    #[test]
    fn an_answer_is_text_that_fits() {
        assert_eq!(read_answer(&answer(Ok(()))), Some(Ok(())));
        assert_eq!(read_answer(&answer(Err("no"))), Some(Err("no".to_owned())));
        assert!(answer(Err(&"ü".repeat(500))).len() <= ANSWER);
        assert_eq!(read_answer(&[0]), None);
    }
}
