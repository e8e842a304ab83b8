//! The host side: KVM, guest memory, the monitor, devices and the control socket.
