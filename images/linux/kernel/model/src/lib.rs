//! Nothing but tests: mm/llfree.c and mm/llfree_aside.c of the kernel patch, the very files, compiled against a model of
//! Linux' page allocator (`stub/buddy.c`) and compared with `shared-layout`'s transitions.
