//! The objects of the process: functions as lgalloc has them, over one instance that is made when it is first needed.

use super::{Handle, Objects, Stats};
use crate::area::{Area, Builder};
use crate::error::{AllocError, AreaError, FreeError};
use crate::fork::Maker;
use crate::space::MemoryKind;
use llfree_base::choices::Switch;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::Duration;

/// Between two looks whether another thread is done with the configuration.
const PAUSE: Duration = Duration::from_millis(1);

/// What the objects of the process are to be; what is left out stays as it is.
#[derive(Clone, Default, Debug)]
pub struct Config {
    size: Option<u64>,
    memory: Option<MemoryKind>,
    local_buffer_bytes: Option<usize>,
    auto_reclaim: Option<Switch>,
}

impl Config {
    /// Nothing is changed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The size of their area: address space, by default as much as the machine has memory. Before the first use only.
    #[must_use]
    pub fn with_size(self, bytes: u64) -> Self {
        Self { size: Some(bytes), ..self }
    }

    /// The kind of their memory. Before the first use only.
    #[must_use]
    pub fn with_memory(self, kind: MemoryKind) -> Self {
        Self { memory: Some(kind), ..self }
    }

    /// What each thread may keep, all classes together.
    #[must_use]
    pub fn with_local_buffer_bytes(self, bytes: usize) -> Self {
        Self { local_buffer_bytes: Some(bytes), ..self }
    }

    /// When what is free goes back to the system.
    #[must_use]
    pub fn with_auto_reclaim(self, switch: Switch) -> Self {
        Self { auto_reclaim: Some(switch), ..self }
    }
}

/// Why a configuration was not taken; nothing of it was.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The area is there already.
    #[error("the size and the kind of memory are settled with the first use of large objects")]
    InUse,
    /// Automatic reclaim cannot be switched so.
    #[error(transparent)]
    Area(#[from] AreaError),
}

static CONFIG: Mutex<Option<Config>> = Mutex::new(None);
static OBJECTS: OnceLock<Objects> = OnceLock::new();

/// The configuration, for the thread that makes the objects; [`AreaError::Forked`] if a thread of the parent had it when this process was
/// forked, for then it does not come free.
fn config() -> Result<MutexGuard<'static, Option<Config>>, AreaError> {
    /// The process whose thread had it last.
    static HAD_BY: AtomicU32 = AtomicU32::new(0);
    let ours = Maker::new().number();
    let mut looks_stuck = false;
    loop {
        match CONFIG.try_lock() {
            Ok(config) => {
                HAD_BY.store(ours, Ordering::Relaxed);
                return Ok(config);
            }
            Err(TryLockError::Poisoned(poisoned)) => {
                HAD_BY.store(ours, Ordering::Relaxed);
                return Ok(poisoned.into_inner());
            }
            Err(TryLockError::WouldBlock) => {
                // Twice, for another thread of this process may have it and not have said so yet.
                let is_stuck = HAD_BY.load(Ordering::Relaxed) != ours;
                if is_stuck && looks_stuck {
                    return Err(AreaError::Forked);
                }
                looks_stuck = is_stuck;
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// The objects of the process. Made on the first call, and never gone.
///
/// # Errors
/// [`AreaError`], each time: a later call may succeed, but not in a child that was forked while another thread made them.
pub fn global() -> Result<&'static Objects, AreaError> {
    if let Some(objects) = OBJECTS.get() {
        return Ok(objects);
    }
    // Held until it is made, so that it is made once.
    let config = config()?;
    if let Some(objects) = OBJECTS.get() {
        return Ok(objects);
    }
    let Config { size, memory, local_buffer_bytes, auto_reclaim } = config.clone().unwrap_or_default();
    let default = || llfree_base::kernel_stats::meminfo_bytes("MemTotal").unwrap_or(16 << 30);
    let area = Area::builder()
        .size(size.unwrap_or_else(default))
        .memory(memory.unwrap_or_default())
        .auto_reclaim(auto_reclaim.unwrap_or(Switch(Some(Builder::AUTO_RECLAIM))))
        .build()?;
    Ok(OBJECTS.get_or_init(|| Objects::new(area, local_buffer_bytes.unwrap_or(Objects::LOCAL_BYTES))))
}

/// Changes what the objects of the process are. May be repeated.
///
/// # Errors
/// [`ConfigError`].
pub fn set_config(new: &Config) -> Result<(), ConfigError> {
    let mut config = config()?;
    if let Some(objects) = OBJECTS.get() {
        if new.size.is_some() || new.memory.is_some() {
            return Err(ConfigError::InUse);
        }
        if let Some(switch) = new.auto_reclaim {
            objects.area().auto_reclaim(switch)?;
        }
        if let Some(bytes) = new.local_buffer_bytes {
            objects.set_local_bytes(bytes);
        }
        return Ok(());
    }
    let old = config.get_or_insert_default();
    old.size = new.size.or(old.size);
    old.memory = new.memory.or(old.memory);
    old.local_buffer_bytes = new.local_buffer_bytes.or(old.local_buffer_bytes);
    old.auto_reclaim = new.auto_reclaim.or(old.auto_reclaim);
    Ok(())
}

/// Allocates at least `capacity` elements: [`Objects::allocate`].
///
/// # Errors
/// [`AllocError`]; [`AllocError::Unavailable`] if there is no area.
pub fn allocate<T>(capacity: usize) -> Result<(NonNull<T>, usize, Handle), AllocError> {
    global().map_err(|_| AllocError::Unavailable)?.allocate(capacity)
}

/// Frees an object, from any thread: [`Objects::deallocate`].
///
/// # Errors
/// [`FreeError`].
pub fn deallocate(handle: Handle) -> Result<(), FreeError> {
    global().map_err(|_| FreeError::Foreign)?.deallocate(handle)
}

/// Statistics of the objects of the process.
///
/// # Errors
/// If there is no area.
pub fn stats() -> Result<Stats, AreaError> {
    global().map(Objects::stats)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::tests::holds_in_a_child;

    #[test]
    fn a_child_that_is_forked_while_another_thread_makes_the_objects_is_told_so() {
        let held = config().expect("nobody is forked");
        let refused = || matches!(global(), Err(AreaError::Forked)) && set_config(&Config::new()).is_err();
        assert!(std::thread::scope(|scope| scope.spawn(|| holds_in_a_child(refused)).join().expect("no panic")));
        drop(held);
        assert!(holds_in_a_child(|| set_config(&Config::new()).is_ok()), "it is free");
        set_config(&Config::new()).expect("it is free");
    }
}
