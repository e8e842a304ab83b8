//! [`NetConfig`]: what `--net` says, and every reason to refuse it.
//!
//! Nothing here asks the host: whether such a tap exists, and who may use it, turns out when it is
//! opened (`tap.rs`).

use llfree_base::units::shorten;
use std::fmt;
use std::str::FromStr;

/// The most networks of one VM.
pub const MOST_NETS: usize = 4;
/// Bytes of an interface's name, as Linux has it: 16 with the zero at its end.
pub const NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// The address of a network card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MacAddr(pub [u8; 6]);

/// A network, as `--net tap=NAME[,mac=ADDRESS]` describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetConfig {
    /// Name of the host's interface.
    pub tap: String,
    /// The guest's address.
    pub mac: MacAddr,
}

/// Why a text is not a [`NetConfig`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NetConfigError {
    /// No interface.
    #[error("a network needs the name of a tap: tap=NAME[,mac=ADDRESS]")]
    NoTap,
    /// No such option.
    #[error("'{0}' is not an option of a network; the options are tap=NAME and mac=ADDRESS")]
    Option(String),
    /// An option that was set before.
    #[error("'{0}' is set twice")]
    Twice(&'static str),
    /// Longer than the kernel's limit.
    #[error("'{name}' has {bytes} bytes, but an interface name has at most {NAME_BYTES}")]
    TooLong {
        /// The text as written.
        name: String,
        /// Its length in bytes.
        bytes: usize,
    },
    /// Not a name that we accept.
    #[error("'{0}' is not an interface name: use letters, digits, '-', '_' and '.', but not . or .. alone")]
    Name(String),
    /// Not an address.
    #[error("'{0}' is not the address of a network card; write it like 02:00:00:00:00:01")]
    Mac(String),
    /// An address that a single card cannot have.
    #[error("{0} is not a single card's address; the first byte of one is even, and not all bytes are 0")]
    NotOne(MacAddr),
    /// More than a VM can have.
    #[error("{0} networks are too many; a VM has at most {MOST_NETS}")]
    TooMany(usize),
    /// Two networks on one tap.
    #[error("tap '{0}' is given twice; each network needs one of its own")]
    SameTap(String),
    /// Two cards with one address.
    #[error("two networks have the address {0}; set another with mac=")]
    SameMac(MacAddr),
}

impl MacAddr {
    /// The default address of a card: the same for the same name, and marked as locally administered.
    /// Networks that are joined need distinct names, or explicit addresses.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        // FNV-1a: any hash that never changes will do.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
        Self([0x02, a ^ f, b ^ g, c ^ h, d, e])
    }

    fn is_one_cards(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for MacAddr {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        let refused = || NetConfigError::Mac(shorten(text));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or_else(refused)?;
        }
        if parts.next().is_some() {
            return Err(refused());
        }
        Some(Self(bytes)).filter(|mac| mac.is_one_cards()).ok_or(NetConfigError::NotOne(Self(bytes)))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for NetConfig {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        let (mut tap, mut mac) = (None, None);
        for option in text.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("tap", _)) if tap.is_some() => return Err(NetConfigError::Twice("tap")),
                Some(("mac", _)) if mac.is_some() => return Err(NetConfigError::Twice("mac")),
                Some(("tap", name)) => tap = Some(check_name(name)?.to_owned()),
                Some(("mac", address)) => mac = Some(address.parse()?),
                _ => return Err(NetConfigError::Option(shorten(option))),
            }
        }
        let tap = tap.ok_or(NetConfigError::NoTap)?;
        let mac = mac.unwrap_or_else(|| MacAddr::of_name(&tap));
        Ok(Self { tap, mac })
    }
}

fn check_name(name: &str) -> Result<&str, NetConfigError> {
    if name.is_empty() {
        return Err(NetConfigError::NoTap);
    }
    if name.len() > NAME_BYTES {
        return Err(NetConfigError::TooLong { name: shorten(name), bytes: name.len() });
    }
    // The kernel accepts more. But a '%' makes it pick a name of its own, and the rest is not useful.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !name.bytes().all(plain) || name == "." || name == ".." {
        return Err(NetConfigError::Name(shorten(name)));
    }
    Ok(name)
}

/// Checks what networks of one VM must not share.
///
/// # Errors
/// Too many networks, or the first that is the same as an earlier one.
pub fn check_nets(nets: &[NetConfig]) -> Result<(), NetConfigError> {
    if nets.len() > MOST_NETS {
        return Err(NetConfigError::TooMany(nets.len()));
    }
    for (index, net) in nets.iter().enumerate() {
        let before = &nets[..index];
        if before.iter().any(|other| other.tap == net.tap) {
            return Err(NetConfigError::SameTap(net.tap.clone()));
        }
        if before.iter().any(|other| other.mac == net.mac) {
            return Err(NetConfigError::SameMac(net.mac));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Result<NetConfig, NetConfigError> {
        text.parse()
    }

    #[test]
    fn networks_are_read_as_people_write_them() {
        let given = net("tap=vm-0,mac=02:AB:00:00:00:01").expect("good");
        assert_eq!((given.tap.as_str(), given.mac.to_string().as_str()), ("vm-0", "02:ab:00:00:00:01"));
        assert_eq!(net("mac=02:ab:00:00:00:01,tap=vm-0"), Ok(given));
        assert_eq!(net("tap=fifteen_letters").expect("good").tap.len(), NAME_BYTES);
    }

    #[test]
    fn a_card_without_an_address_always_gets_the_same_local_one() {
        let mac = net("tap=tap0").expect("good").mac;
        assert_eq!(mac, MacAddr::of_name("tap0"));
        assert_eq!(mac.to_string(), "02:ea:b3:75:07:ef", "also with the next release");
        let all: Vec<MacAddr> = (0..1000).map(|number| MacAddr::of_name(&format!("tap{number}"))).collect();
        for (index, mac) in all.iter().enumerate() {
            assert!(mac.0[0] == 2 && !all[..index].contains(mac), "tap{index}: {mac}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        let line = |text: &str| net(text).expect_err(text).to_string();
        for text in ["", ",", "tap=", "mac=02:00:00:00:00:01"] {
            assert!(line(text).contains("needs the name of a tap: tap=NAME"), "{}", line(text));
        }
        assert!(line("tap=sixteen_letters_").contains("has 16 bytes, but an interface name has at most 15"));
        for name in ["a b", "a/b", "tap%d", ".", "..", "t\u{e4}p", "a:1"] {
            assert!(line(&format!("tap={name}")).contains("not an interface name"), "{name}");
        }
        for text in ["tap0", "tap=a,queues=2", "tap=a,mac", "bridge=br0"] {
            assert!(line(text).contains("not an option of a network"), "{text}");
        }
        assert_eq!(line("tap=a,tap=b"), "'tap' is set twice");
        for mac in ["", "02:00", "02:00:00:00:00:01:02", "2:0:0:0:0:1", "+2:00:00:00:00:01", "0g:00:00:00:00:00"] {
            assert!(line(&format!("tap=a,mac={mac}")).contains("write it like 02:00"), "{mac}");
        }
        for mac in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(line(&format!("tap=a,mac={mac}")).starts_with(mac), "{mac}");
        }
    }

    #[test]
    fn networks_of_one_vm_share_nothing() {
        let all = |texts: &[&str]| -> Result<(), NetConfigError> {
            check_nets(&texts.iter().map(|text| net(text).expect("good")).collect::<Vec<_>>())
        };
        assert_eq!(all(&["tap=a", "tap=b"]), Ok(()));
        assert_eq!(all(&["tap=a", "tap=b", "tap=a,mac=02:00:00:00:00:01"]), Err(NetConfigError::SameTap("a".into())));
        let mac = MacAddr([2, 0, 0, 0, 0, 1]);
        assert_eq!(
            all(&["tap=a,mac=02:00:00:00:00:01", "tap=b,mac=02:00:00:00:00:01"]),
            Err(NetConfigError::SameMac(mac))
        );
        assert_eq!(all(&["tap=a", "tap=b", "tap=c", "tap=d", "tap=e"]), Err(NetConfigError::TooMany(5)));
    }
}
