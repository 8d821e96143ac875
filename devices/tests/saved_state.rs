//! Encoded form of every saved state in this crate.
//!
//! The bytes below were written by the first version of each snapshot type. Later builds must keep reading them, so a
//! change that breaks a test here breaks migration from older hosts.

use std::fmt::Debug;

use devices::acpi::{EventsSnapshot, SleepSnapshot};
use devices::virtio::{
    BalloonSnapshot, BlockSnapshot, ConsoleSnapshot, DeviceState, NetSnapshot, QueueSnapshot,
    RngSnapshot, TransportSnapshot, VhostUserSnapshot, VirtioSnapshot, VsockSnapshot,
};
use devices::{RtcSnapshot, SavedState, SerialSnapshot, StateError, decode_state, encode_state};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks that `state` is encoded as `expected` (hexadecimal), decodes to an equal value, and that a newer version and
/// trailing bytes are refused.
#[track_caller]
fn check<T: SavedState + PartialEq + Debug>(state: &T, expected: &str) {
    let mut bytes = encode_state(state);
    assert_eq!(hex(&bytes), expected);
    assert_eq!(&decode_state::<T>(1, &bytes).unwrap(), state);
    assert_eq!(&decode_state::<T>(T::VERSION, &bytes).unwrap(), state);
    let newer = decode_state::<T>(T::VERSION + 1, &bytes);
    assert!(matches!(newer, Err(StateError::NewerVersion { .. })));
    bytes.push(0);
    let longer = decode_state::<T>(T::VERSION, &bytes);
    assert!(matches!(longer, Err(StateError::TrailingBytes(1))));
}

#[test]
fn serial_port() {
    let state = SerialSnapshot {
        divisor_low: 1,
        divisor_high: 2,
        interrupt_enable: 3,
        interrupt_identification: 4,
        line_control: 5,
        line_status: 0x60,
        modem_control: 7,
        modem_status: 0xb0,
        scratch: 9,
        receive_fifo: vec![10, 11],
        waiting_input: vec![12],
    };
    check(
        &state,
        "ab0001010202030304040505186006070718b0080909420a0b0a410c",
    );
}

#[test]
fn real_time_clock() {
    let state = RtcSnapshot {
        index: 0x7f,
        cmos: vec![1, 2, 3],
        offset_us: -3_600_000_000,
        update_seen_s: 1_709_251_198,
    };
    check(&state, "a400187f0143010203023ad693a3ff031a65e11a7e");
}

#[test]
fn acpi_registers() {
    check(&SleepSnapshot { sleep_type: 5 }, "a10005");
    check(&EventsSnapshot { pending: 3 }, "a10003");
}

#[test]
fn virtio_device() {
    let queue = QueueSnapshot {
        max_size: 256,
        size: 128,
        ready: true,
        descriptor_table: 0x1_0000_0000,
        available_ring: 0x2000,
        used_ring: 0x3000,
        next_available: 7,
        next_used: 6,
    };
    let state = VirtioSnapshot {
        transport: TransportSnapshot {
            device_type: 2,
            status: 15,
            needs_reset: false,
            device_features: 1 << 32,
            device_features_select: 1,
            driver_features: 1 << 32,
            driver_features_select: 1,
            queue_select: 3,
            interrupt_status: 1,
            config_generation: 4,
            queues: vec![queue],
        },
        device: DeviceState {
            version: 1,
            data: vec![0xa0],
        },
    };
    check(
        &state,
        "a200ab0002010f02f4031b00000001000000000401051b000000010000000006010703080109040a81a80019010001188002f5031b000000010000000004192000051930000607070601a200010141a0",
    );
}

#[test]
fn device_models() {
    let balloon = BalloonSnapshot {
        target_pages: 50,
        actual_pages: 40,
    };
    check(&balloon, "a2001832011828");
    let block = BlockSnapshot {
        sectors: 2048,
        id: b"disk".to_vec(),
    };
    check(&block, "a20019080001446469736b");
    let console = ConsoleSnapshot {
        waiting_input: b"ls".to_vec(),
    };
    check(&console, "a100426c73");
    let net = NetSnapshot {
        mac: [0x52, 0x54, 0, 1, 2, 3],
        waiting_packet: vec![9],
    };
    check(&net, "a20046525400010203014109");
    check(&RngSnapshot {}, "a0");
    let vhost_user = VhostUserSnapshot {
        sectors: 2048,
        write_back: true,
    };
    check(&vhost_user, "a20019080002f5");
    check(&VsockSnapshot { guest_cid: 3 }, "a10003");
}

/// The device type alone does not tell a disk that this process serves from one that a vhost-user back end serves.
#[test]
fn the_two_kinds_of_disks_do_not_read_each_others_state() {
    let block = DeviceState::new(&BlockSnapshot {
        sectors: 1,
        id: Vec::new(),
    });
    block.decode::<VhostUserSnapshot>("disk").unwrap_err();
    let vhost_user = DeviceState::new(&VhostUserSnapshot {
        sectors: 1,
        write_back: false,
    });
    let error = vhost_user.decode::<BlockSnapshot>("disk").unwrap_err();
    assert!(error.to_string().starts_with("disk state: "), "{error}");
}
