//! Seccomp filters: each thread may make the system calls of its role, with the arguments that the
//! role needs; any other call ends the process with one line that names it.
//!
//! [`compile`] makes all programs before the first thread starts; [`install`] gives the calling
//! thread its own, for good: no thread can get rid of its filter, and its children inherit it.

use crate::every_thread::EVERY_THREAD;
use llfree_base::thread::Role;
use llfree_base::thread::rights::Allow;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;
use std::sync::OnceLock;
use vmm_sys_util::signal::register_signal_handler;

/// The exit code after a forbidden call: what a shell shows for a death by SIGSYS.
pub const EXIT_FORBIDDEN: u8 = 128 + libc::SIGSYS as u8;

/// What becomes of a system call that a thread's filter does not know.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Seccomp {
    /// The process ends with a line that names the call.
    #[default]
    On,
    /// The call is made, and the kernel's audit log says so.
    Log,
    /// There are no filters.
    Off,
}

impl FromStr for Seccomp {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "on" => Ok(Self::On),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(UnknownMode(text.to_owned())),
        }
    }
}

/// A word that is not a [`Seccomp`] mode.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("unknown seccomp mode `{0}`: use on, log or off")]
pub struct UnknownMode(String);

/// The reason that filters could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel, or the container that we run in, has no filters to give.
    #[error("this kernel, or the container around the VMM, offers no seccomp filters")]
    Unsupported(#[source] io::Error),
    /// A list that makes no program.
    #[error("the seccomp filter of thread type '{role}' cannot be compiled")]
    Compile {
        /// Which.
        role: &'static str,
        /// The compiler's answer.
        source: seccompiler::Error,
    },
    /// The handler that names the call.
    #[error("the handler for forbidden system calls cannot be installed")]
    Handler(#[source] io::Error),
}

/// Why a thread has no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum InstallError {
    /// None was compiled for it.
    #[error("no filter was compiled for its role")]
    UnknownRole,
    /// The kernel's answer.
    #[error(transparent)]
    Refused(#[from] seccompiler::Error),
}

/// The compiled filters.
pub(super) struct Filters {
    by_role: BTreeMap<&'static str, BpfProgram>,
    /// Refuses `clone3`; on top of every other filter.
    no_clone3: BpfProgram,
}

/// What the line about a forbidden call advises, for the whole process as the handler is.
static ADVICE: OnceLock<&'static str> = OnceLock::new();

/// Ends the line about a forbidden system call with a word on what its user can do meanwhile: one
/// short clause without a line break. Only the first one counts, and what the line has no room for
/// is cut off.
pub fn advise_on_forbidden_calls(advice: &'static str) {
    ADVICE.get_or_init(|| advice);
}

thread_local! {
    /// For the handler: a `const` cell without a destructor can be read at any moment.
    static ROLE: Cell<&'static str> = const { Cell::new("?") };
}

/// Compiles the filters of all `roles`, and prepares this process to say which call was forbidden.
/// `None` for [`Seccomp::Off`].
pub(super) fn compile(mode: Seccomp, roles: impl IntoIterator<Item = Role>) -> Result<Option<Filters>, SeccompError> {
    let mismatch = match mode {
        Seccomp::On => SeccompAction::Trap,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Off => return Ok(None),
    };
    is_supported().map_err(SeccompError::Unsupported)?;
    register_signal_handler(libc::SIGSYS, on_forbidden).map_err(|error| SeccompError::Handler(error.into()))?;
    let by_role = roles
        .into_iter()
        .map(|role| {
            let program = rules(role).and_then(|rules| program(rules, mismatch.clone(), SeccompAction::Allow));
            program
                .map(|program| (role.name(), program))
                .map_err(|source| SeccompError::Compile { role: role.name(), source })
        })
        .collect::<Result<_, _>>()?;
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let no_clone3 = program(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
        .map_err(|source| SeccompError::Compile { role: "any", source })?;
    Ok(Some(Filters { by_role, no_clone3 }))
}

/// Puts the calling thread under its role's filter. `no_new_privs` is set too, as filters need it.
pub(super) fn install(filters: &Filters, role: Role) -> Result<(), InstallError> {
    let program = filters.by_role.get(role.name()).ok_or(InstallError::UnknownRole)?;
    ROLE.set(role.name());
    seccompiler::apply_filter(&filters.no_clone3)?;
    Ok(seccompiler::apply_filter(program)?)
}

/// Asks whether the kernel knows the action that we need.
fn is_supported() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads four bytes at the pointer, which are there, and changes nothing.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn program(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, seccompiler::Error> {
    let filter = SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// A role's permissions as the compiler wants them: a call with any one of its rules is allowed,
/// and one without rules always.
fn rules(role: Role) -> Result<Rules, seccompiler::Error> {
    let mut all = Rules::new();
    let mut always = Vec::new();
    for allow in role.rights().iter().copied().chain([EVERY_THREAD]).flatten() {
        let mut with = |call, conditions: Vec<(u8, SeccompCmpOp, u64)>| {
            let conditions = conditions
                .into_iter()
                .map(|(index, op, value)| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value))
                .collect::<Result<_, _>>()?;
            all.entry(call).or_default().push(SeccompRule::new(conditions)?);
            Ok::<_, seccompiler::Error>(())
        };
        match *allow {
            Allow::Call(call) => always.push(call),
            Allow::With(call, index, values) => {
                values.iter().try_for_each(|value| with(call, vec![(index, SeccompCmpOp::Eq, *value)]))?;
            }
            Allow::Without(call, index, bits) => with(call, vec![(index, SeccompCmpOp::MaskedEq(bits), 0)])?,
            Allow::WithBits(call, index, bits) => with(call, vec![(index, SeccompCmpOp::MaskedEq(bits), bits)])?,
            Allow::Null(call, index) => {
                let null = SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
                all.entry(call).or_default().push(SeccompRule::new(vec![null])?);
            }
            Allow::Signal(signals) => {
                let process = std::process::id().into();
                for signal in signals {
                    let to_us = (0, SeccompCmpOp::Eq, process);
                    with(libc::SYS_tgkill, vec![to_us, (2, SeccompCmpOp::Eq, *signal)])?;
                }
            }
        }
    }
    all.extend(always.into_iter().map(|call| (call, Vec::new())));
    Ok(all)
}

/// Ends the process, saying which call it was. Only what is safe in a signal handler.
extern "C" fn on_forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // `si_syscall` of the kernel's siginfo for SIGSYS, which libc does not name: after signal,
    // errno, code, padding and the address of the call.
    const SI_SYSCALL: usize = 24;
    // SAFETY: the kernel passes a valid siginfo of 128 bytes, and for a SIGSYS of seccomp's this
    // field is set; for one that somebody else sent it is any number.
    let call = unsafe { info.cast::<u8>().add(SI_SYSCALL).cast::<i32>().read_unaligned() };
    let mut line = Line { bytes: [0; 160], len: 0 };
    line.push(b"llfree-vmm: error: thread '");
    line.push(ROLE.get().as_bytes());
    line.push(b"' made system call ");
    if call < 0 {
        line.push(b"-");
    }
    line.push_number(call.unsigned_abs());
    line.push(b", which its seccomp filter forbids; please report this");
    // A look at what was set once is an atomic load.
    if let Some(advice) = ADVICE.get() {
        line.push(b", and ");
        line.push(advice.as_bytes());
    }
    line.end();
    // A pipe that nobody reads must not keep the process from ending.
    let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure of the kernel's, and no wait.
    unsafe { libc::poll(&raw mut stderr, 1, 0) };
    if stderr.revents & libc::POLLOUT != 0 {
        // SAFETY: the bytes are there; nobody is left to tell if it fails.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    }
    // SAFETY: it ends the process and touches none of its memory.
    unsafe { libc::_exit(EXIT_FORBIDDEN.into()) };
}

/// A line on the stack: a signal handler must not allocate.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    /// Adds what there is room for, and leaves some for the end.
    fn push(&mut self, text: &[u8]) {
        let last = self.bytes.len() - 1;
        let room = self.bytes[self.len..last].iter_mut();
        self.len += room.zip(text).map(|(to, from)| *to = *from).count();
    }

    /// Ends the line; nothing is pushed after that.
    fn end(&mut self) {
        self.bytes[self.len] = b'\n';
        self.len += 1;
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            self.push(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::thread::rights::{EVENTS, READ_FILES};

    const ROLE: Role = Role::new("reader", &[READ_FILES, EVENTS]);

    #[test]
    fn a_role_compiles_and_an_unknown_one_gets_no_thread() {
        let filters = match compile(Seccomp::On, [ROLE]) {
            Ok(filters) => filters.expect("it is on"),
            Err(SeccompError::Unsupported(error)) => return test_support::skipped(format!("no seccomp: {error}")),
            Err(error) => panic!("{}", llfree_base::error_line(&error)),
        };
        assert!((50..1000).contains(&filters.by_role[ROLE.name()].len()));
        let unknown = install(&filters, Role::new("nobody", &[]));
        assert!(matches!(unknown, Err(InstallError::UnknownRole)), "{unknown:?}");
    }

    #[test]
    fn a_call_with_and_without_conditions_is_always_allowed() {
        let rules = rules(ROLE).expect("compiles");
        assert!(rules[&libc::SYS_write].is_empty() && rules[&libc::SYS_read].is_empty());
        assert_eq!((rules[&libc::SYS_openat].len(), rules[&libc::SYS_sendto].len()), (1, 1));
    }

    #[test]
    fn a_line_holds_what_fits_and_numbers_as_people_write_them() {
        let mut line = Line { bytes: [0; 160], len: 0 };
        for number in [0, 7, 59, 435, u32::MAX] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 59 435 4294967295 ");
        line.push(&[b'x'; 200]);
        line.end();
        assert_eq!((line.len, line.bytes[159]), (160, b'\n'));
    }
}
