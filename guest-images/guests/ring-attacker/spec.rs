//! Constants of the virtio 1.2 specification.

/// Address of the first device of Ferry, and distance between devices.
pub(crate) const FIRST_DEVICE: u64 = 0xd000_0000;
pub(crate) const DEVICE_BYTES: u64 = 0x1000;

/// Registers (4.2.2, table 4.1).
pub(crate) mod register {
    pub(crate) const MAGIC_VALUE: u64 = 0x000;
    pub(crate) const VERSION: u64 = 0x004;
    pub(crate) const DEVICE_ID: u64 = 0x008;
    pub(crate) const VENDOR_ID: u64 = 0x00c;
    pub(crate) const DEVICE_FEATURES: u64 = 0x010;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(crate) const QUEUE_NUM: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x060;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    /// Low halves of the addresses of the descriptor table, the available ring and the used ring. The high half follows
    /// each.
    pub(crate) const QUEUE_ADDRESSES: [u64; 3] = [0x080, 0x090, 0x0a0];
    pub(crate) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(crate) const CONFIG: u64 = 0x100;
}

pub(crate) const MAGIC: u32 = 0x7472_6976;
pub(crate) const VERSION: u32 = 2;

/// Device status (2.1).
pub(crate) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const DEVICE_NEEDS_RESET: u32 = 64;
    /// Status after a complete initialization.
    pub(crate) const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

/// Bit of `InterruptStatus`: the configuration changed or the device needs a reset.
pub(crate) const CONFIGURATION_CHANGE: u32 = 2;

/// Feature bits (6; 5.1.3, 5.2.3, 5.5.3).
pub(crate) mod feature {
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    pub(crate) const NET_CSUM: u64 = 1;
    pub(crate) const NET_HOST_TSO4: u64 = 1 << 11;
    pub(crate) const BLOCK_FLUSH: u64 = 1 << 9;
    pub(crate) const BLOCK_DISCARD: u64 = 1 << 13;
    pub(crate) const BLOCK_WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const BALLOON_REPORTING: u64 = 1 << 5;
}

/// Descriptor flags (2.7.5).
pub(crate) mod descriptor {
    pub(crate) const NEXT: u16 = 1;
    pub(crate) const WRITE: u16 = 2;
    pub(crate) const INDIRECT: u16 = 4;
    pub(crate) const BYTES: u32 = 16;
}

/// Kinds of devices that the program can attack (5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Net,
    Block,
    Console,
    Rng,
    Balloon,
    Vsock,
}

impl Kind {
    pub(crate) fn of(device_id: u32) -> Option<Self> {
        Some(match device_id {
            1 => Self::Net,
            2 => Self::Block,
            3 => Self::Console,
            4 => Self::Rng,
            5 => Self::Balloon,
            19 => Self::Vsock,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
        }
    }

    /// Returns the names of the queues by number.
    pub(crate) fn queues(self) -> &'static [&'static str] {
        match self {
            Self::Net | Self::Console => &["receive", "transmit"],
            Self::Block | Self::Rng => &["requests"],
            Self::Balloon => &["inflate", "deflate", "reporting"],
            Self::Vsock => &["receive", "transmit", "events"],
        }
    }

    /// Returns the queue for requests of the driver.
    pub(crate) fn main_queue(self) -> usize {
        match self {
            Self::Net | Self::Console | Self::Vsock => 1,
            Self::Block | Self::Rng | Self::Balloon => 0,
        }
    }

    /// Returns true if the queue holds receive buffers.
    pub(crate) fn is_receive(self, queue: usize) -> bool {
        matches!(self, Self::Net | Self::Vsock | Self::Console) && queue == 0
    }

    /// Returns true if the device writes the first descriptor of a request.
    pub(crate) fn is_written(self, queue: usize) -> bool {
        self.is_receive(queue)
            || matches!(
                (self, queue),
                (Self::Rng, _) | (Self::Vsock | Self::Balloon, 2)
            )
    }

    /// Returns the features that the driver accepts if they are offered, besides VERSION_1.
    pub(crate) fn wanted_features(self) -> u64 {
        feature::INDIRECT_DESC
            | match self {
                Self::Net => feature::NET_CSUM | feature::NET_HOST_TSO4,
                Self::Block => {
                    feature::BLOCK_FLUSH | feature::BLOCK_DISCARD | feature::BLOCK_WRITE_ZEROES
                }
                Self::Balloon => feature::BALLOON_REPORTING,
                Self::Console | Self::Rng | Self::Vsock => 0,
            }
    }
}
