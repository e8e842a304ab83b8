//! The binary `llfree-vmm` as its users meet it: launched, asked, signalled, given bad input, killed.
//!
//! One binary for all of them: it is linked once, and while a test waits for its VM another one works. So no test here
//! may change what belongs to its whole process (variables, limits, the working directory); what it starts may.

mod areas;
mod auto_reclaim;
mod bad_input;
mod cgroup;
mod cli;
mod client_commands;
mod clients;
mod common;
mod config;
mod console;
mod control_socket;
mod crashes;
mod demo;
mod full_log;
mod kill;
mod launch;
mod life;
mod linux_input;
mod metrics;
mod own_guest;
mod pause;
mod protocol_page;
mod pursuit;
mod sandbox;
mod service_manager;
mod signals;
mod silent_guest;
mod top;
mod violations;
mod words;
