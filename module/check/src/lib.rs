//! Nothing but tests: the transitions of the kernel module (`../llfree_entry.h`), for comparison with `shared-layout`'s, and how
//! long it waits (`../patience.h`), the very files, compiled without a kernel. The program beside this has the module at work.
