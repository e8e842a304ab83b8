//! Nothing but tests: mm/llfree.c of the kernel patch, the very file, compiled against a model of Linux' page
//! allocator (`stub/buddy.c`) and compared with `shared-layout`'s transitions.
