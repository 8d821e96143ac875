//! The program `ring-attacker`, booted where there is nothing for it to attack. What it does elsewhere is tested with the
//! monitor whose devices it attacks.

use crate::machine::{Guest, everywhere};

#[test]
fn without_a_device_at_its_place_it_says_so_and_ends() {
    everywhere(|accelerator| {
        let ended = Guest::ring_attacker(accelerator, "hold").end();
        assert_eq!(ended.lines.len(), 1, "{ended:?}");
        let start = "ring-attacker: cannot start: no virtio device at 0xd0000000";
        assert!(ended.lines[0].starts_with(start), "{ended:?}");
        assert_eq!(ended.status, 2);
    });
}
