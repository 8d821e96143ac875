//! vCPU threads: running, stopping without a lost kick, and what ends them.

mod gate;
mod thread;
mod throttle;

pub use gate::{Gate, KickError, VcpuStats};
pub use thread::{GuestEnd, Vcpu, VcpuContext};
pub use throttle::Throttle;
