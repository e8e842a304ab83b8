//! Nothing but tests: the transitions of the kernel module (`../llfree_entry.h`), the very file, compiled for
//! comparison with `shared-layout`'s. The program beside this has the module at work.
