//! Opens a tap of the host, or says what to do about it.
//!
//! The only file here with ioctls. All of them are done before the guest starts; its thread reads
//! and writes frames and nothing else.

use super::config::NetConfig;
use super::frame::{HEADER_BYTES, MAX_FRAME};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

const DEVICE: &str = "/dev/net/tun";
/// How much the host's kernel buffers of a guest's frames that were not taken yet, in its own count of
/// bytes; without this limit a guest could make it 2 GiB.
const SEND_BUFFER: libc::c_int = 1 << 20;
/// The smallest MTU; drivers do not accept less.
const LEAST_MTU: u16 = 68;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The host has no driver for taps.
    #[error(
        "there is no {DEVICE} for tap '{tap}': load the tun module on the host, or pass the device on to this container"
    )]
    NoTun {
        /// The tap.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// This user may not open taps.
    #[error(
        "this user may not open {DEVICE} for tap '{tap}': allow it with chmod 666 {DEVICE} (as root), as most systems \
         have it"
    )]
    NoAccess {
        /// The tap.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Another user's, or missing and this user cannot create it.
    #[error(
        "tap '{tap}' is not there or not this user's: ip tuntap add dev {tap} mode tap user $USER && ip link set {tap} \
         up (as root), or run this with CAP_NET_ADMIN"
    )]
    Permission {
        /// The tap.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("tap '{tap}' is in use by another process, maybe another VM; give each VM a tap of its own")]
    Busy {
        /// The tap.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// An interface of another kind.
    #[error("interface '{tap}' is not a tap with one queue; make one with: ip tuntap add dev NAME mode tap")]
    NoTap {
        /// The interface.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("the host could not {step} tap '{tap}'")]
    Host {
        /// The step that failed.
        step: &'static str,
        /// The tap.
        tap: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// A tap, ours as long as the descriptor is open.
pub(super) struct Tap {
    /// Non-blocking; each read or write moves one frame with its header.
    pub(super) fd: OwnedFd,
    /// The size of the largest packet in a frame, in bytes.
    pub(super) mtu: u16,
}

impl Tap {
    pub(super) fn open(config: &NetConfig) -> Result<Self, NetError> {
        let tap = || config.tap.clone();
        let failed = |step| move |source: io::Error| NetError::Host { step, tap: tap(), source };
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let fd: OwnedFd = match opened {
            Ok(file) => file.into(),
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(NetError::NoAccess { tap: tap(), source });
            }
            Err(source) if matches!(Errno::from_io_error(&source), Some(Errno::NOENT | Errno::NODEV | Errno::NXIO)) => {
                return Err(NetError::NoTun { tap: tap(), source });
            }
            Err(source) => return Err(failed("open /dev/net/tun for")(source)),
        };
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .map_err(failed("look at"))?;
        let mut request = request(&config.tap);
        // SAFETY: the request is initialised, and the kernel writes to nothing but its union.
        let was_there = unsafe { ioctl_with_mut_ref(&socket, libc::SIOCGIFFLAGS, &mut request) } == 0;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: as above; the flags were set.
        if unsafe { ioctl_with_mut_ref(&fd, libc::TUNSETIFF, &mut request) } != 0 {
            let source = io::Error::last_os_error();
            return Err(match Errno::from_io_error(&source) {
                Some(Errno::PERM | Errno::ACCESS) => NetError::Permission { tap: tap(), source },
                Some(Errno::BUSY) => NetError::Busy { tap: tap(), source },
                Some(Errno::INVAL) => NetError::NoTap { tap: tap(), source },
                _ => NetError::Host { step: "open", tap: tap(), source },
            });
        }
        let check = |done: libc::c_int| if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        let header = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads an int.
        check(unsafe { ioctl_with_ref(&fd, libc::TUNSETVNETHDRSZ, &header) }).map_err(failed("set the header of"))?;
        // SAFETY: the argument is a number; none of its bits is set.
        check(unsafe { ioctl_with_val(&fd, libc::TUNSETOFFLOAD, 0) }).map_err(failed("set the offloads of"))?;
        // SAFETY: the kernel reads an int.
        check(unsafe { ioctl_with_ref(&fd, libc::TUNSETSNDBUF, &SEND_BUFFER) })
            .map_err(failed("bound the buffer of"))?;
        // SAFETY: the request is initialised, and the kernel writes to nothing but its union.
        check(unsafe { ioctl_with_mut_ref(&socket, libc::SIOCGIFMTU, &mut request) }).map_err(failed("look at"))?;
        // SAFETY: the kernel just wrote that member.
        let mtu = mtu(unsafe { request.ifr_ifru.ifru_mtu });
        // SAFETY: the request is initialised, and the kernel writes to nothing but its union.
        check(unsafe { ioctl_with_mut_ref(&socket, libc::SIOCGIFFLAGS, &mut request) }).map_err(failed("look at"))?;
        // SAFETY: the kernel just wrote that member.
        let is_up = i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_UP != 0;
        if !was_there {
            log::warn!(
                "tap '{0}' did not exist and goes away with this VM; give it an address: \
                 ip addr add ADDRESS dev {0} && ip link set {0} up",
                config.tap
            );
        } else if !is_up {
            log::warn!("tap '{0}' is down and carries no frames: ip link set {0} up", config.tap);
        }
        Ok(Self { fd, mtu })
    }
}

/// The interface's MTU, limited to what one of our frames can carry.
fn mtu(bytes: libc::c_int) -> u16 {
    // An Ethernet header, and one for a virtual network.
    const HEADERS: usize = 14 + 4;
    let most = u16::try_from(MAX_FRAME - HEADERS).unwrap_or(u16::MAX);
    u16::try_from(bytes).unwrap_or(most).clamp(LEAST_MTU, most)
}

/// An interface's request for an ioctl; the rest of it is zero.
fn request(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // The last byte stays zero: a name that passed the check is shorter.
    for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: all members of the union are plain numbers, and a pointer that may be null.
    let ifr_ifru = unsafe { std::mem::zeroed() };
    libc::ifreq { ifr_name, ifr_ifru }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_fits_frames_and_drivers() {
        assert_eq!([1500, 9000, 65_521].map(mtu), [1500, 9000, 65_518]);
        assert_eq!([0, -1, 1 << 20].map(mtu), [68, 65_518, 65_518]);
    }
}
