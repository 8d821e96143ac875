//! vCPU threads: their loop, the gate that stops them without a lost kick, and the throttle.

mod gate;
mod thread;
mod throttle;

pub use gate::{Gate, KickError, VcpuStats};
pub use thread::{GuestEnd, Vcpu, VcpuContext};
pub use throttle::Throttle;
