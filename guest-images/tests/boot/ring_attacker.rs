//! Test of the program `ring-attacker` in a machine without virtio devices. The package ferry-tests runs its attacks on
//! Ferry's devices.

use crate::machine::{Guest, everywhere};

#[test]
fn without_a_device_it_prints_an_error_and_ends() {
    everywhere(|accelerator| {
        let ended = Guest::ring_attacker(accelerator, "hold").end();
        assert_eq!(ended.lines.len(), 1, "{ended:?}");
        let start = "ring-attacker: cannot start: no virtio device at 0xd0000000";
        assert!(ended.lines[0].starts_with(start), "{ended:?}");
        assert_eq!(ended.status, 2);
    });
}
