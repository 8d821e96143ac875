//! Both ends of a live migration of this monitor's machines: adapters between [`machine`](crate::machine) and the
//! engine in the crate `migration`, and the addresses that guests are sent to.

mod destination;
mod endpoint;
mod source;

use crate::config::DevicesConfig;
use crate::memory::Backing;

pub use crate::socket_path::{SOCKET_PATH_MAX, SocketPathTooLong, check_socket_path};
pub use destination::{MachineDestination, OnArrival};
pub use endpoint::{Connection, EndpointError, Listener, SocketFile, Url, listen_unix};
pub use source::MachineSource;

/// Limits and host resources for a guest that arrives.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Maximum bytes of guest memory. Independently of it, the memory that is populated when the migration begins
    /// must be available on the host.
    pub memory_limit: Option<u64>,
    /// Kind of host memory behind the guest's RAM.
    pub backing: Backing,
    /// Host resources of the guest's devices. They must fit the devices that the guest has.
    pub devices: DevicesConfig,
}
