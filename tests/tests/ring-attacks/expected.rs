//! Expected outcome of each attack, and its comparison with the report of the guest.

use std::collections::BTreeMap;

/// Devices in the order in which the guest finds them, with the numbers of their queues.
const DEVICES: [(&str, &[&str]); 6] = [
    ("block", &["requests"]),
    ("net", &["receive", "transmit"]),
    ("rng", &["requests"]),
    ("vsock", &["receive", "transmit", "events"]),
    ("balloon", &["inflate", "deflate", "reporting"]),
    ("console", &["receive", "transmit"]),
];
/// Attacks on every queue after which the device needs a reset.
const EVERY_QUEUE: [&str; 30] = [
    "chain-next-is-itself",
    "chain-cycle-of-three",
    "chain-next-out-of-range",
    "chain-next-is-the-largest",
    "head-out-of-range",
    "head-is-the-largest",
    "available-index-too-far",
    "available-index-backwards",
    "length-is-the-largest",
    "length-is-none",
    "address-behind-memory",
    "address-across-the-end",
    "address-in-the-hole",
    "address-of-registers",
    "address-wraps",
    "address-of-the-last-page",
    "address-above-physical",
    "readable-behind-writable",
    "table-in-a-table",
    "table-of-odd-length",
    "table-of-no-length",
    "table-of-65536",
    "table-behind-memory",
    "table-across-the-end",
    "table-wraps",
    "table-of-registers",
    "table-cycle",
    "table-next-out-of-range",
    "chain-longer-than-any-queue",
    "length-sum-above-4-gib",
];
/// Attacks on every queue but the event queue of vsock, which the device reads only when it has an event.
const WRONG_DIRECTION: &str = "wrong-direction";

/// Attacks on the first queue of each device during its setup, after which the device needs a reset.
const FIRST_QUEUE: [&str; 16] = [
    "table-ring-behind-memory",
    "table-ring-across-the-end",
    "table-ring-unaligned",
    "table-ring-wraps",
    "table-ring-in-registers",
    "available-ring-behind-memory",
    "available-ring-across-the-end",
    "available-ring-unaligned",
    "available-ring-wraps",
    "available-ring-in-registers",
    "used-ring-behind-memory",
    "used-ring-across-the-end",
    "used-ring-unaligned",
    "used-ring-wraps",
    "used-ring-in-registers",
    "ready-without-addresses",
];
/// Attacks on the first queue of each device that have no effect.
const FIRST_QUEUE_IGNORED: [&str; 5] = [
    "size-is-none",
    "size-is-no-power-of-two",
    "size-above-the-most",
    "size-above-16-bits",
    "ready-before-the-features",
];

/// Attacks on the registers of each device that have no effect.
const DEVICE_IGNORED: [&str; 27] = [
    "features-never-offered",
    "features-without-version-1",
    "features-above-64-bits",
    "driver-ok-without-features-ok",
    "features-ok-without-driver",
    "status-of-unknown-bits",
    "notified-before-driver-ok",
    "status-written-backwards",
    "status-needs-reset-written",
    "status-written-again",
    "reset-again-and-again",
    "live-queue-size",
    "live-queue-addresses",
    "live-queue-ready-again",
    "live-features",
    "live-no-features",
    "registers-read-in-odd-widths",
    "registers-written-in-odd-widths",
    "registers-that-are-not",
    "registers-to-read-written",
    "registers-to-write-read",
    "queue-that-is-not",
    "notified-queue-that-is-not",
    "interrupt-acknowledged-that-is-not",
    "config-written",
    "config-beyond-its-end",
    "accesses-across-the-page",
];
/// Attacks on each device while it processes requests, with their outcome.
const DEVICE_OTHER: [(&str, &str); 4] = [
    ("event-index-of-nonsense", "served"),
    ("queue-taken-back-under-load", "quiet"),
    ("reset-under-load", "quiet"),
    ("rings-rewritten-under-load", "survived"),
];

/// Attacks on one kind of device: target, outcome and attacks.
pub(super) const PARTICULAR: [(&str, &str, &[&str]); 18] = [
    (
        "device=block",
        "io-error",
        &[
            "read-behind-the-end",
            "read-across-the-end",
            "read-at-the-largest",
            "read-whose-bytes-wrap",
            "read-of-half-a-sector",
            "read-of-nothing",
            "read-of-a-megabyte-too-much",
            "write-behind-the-end",
            "write-across-the-end",
            "write-at-the-largest",
            "write-of-half-a-sector",
            "discard-behind-the-end",
            "discard-that-wraps",
            "discard-of-the-most",
            "discard-good-then-bad",
            "discard-of-too-many",
            "discard-of-half-a-range",
            "discard-of-nothing",
            "zeroes-behind-the-end",
            "zeroes-good-then-bad",
            "identification-too-short",
        ],
    ),
    (
        "device=block",
        "unsupported",
        &[
            "type-unknown",
            "discard-of-unknown-flags",
            "zeroes-of-unknown-flags",
        ],
    ),
    (
        "device=block",
        "needs-reset",
        &["header-too-short", "status-alone"],
    ),
    ("device=block", "served", &["header-in-pieces"]),
    (
        "device=net queue=transmit",
        "needs-reset",
        &["net-header-too-short"],
    ),
    ("device=net queue=transmit", "dropped", &NET_DROPPED),
    (
        "device=net queue=receive",
        "dropped",
        &["receive-buffer-too-small"],
    ),
    (
        "device=vsock queue=transmit",
        "needs-reset",
        &[
            "packet-header-too-short",
            "packet-shorter-than-it-says",
            "packet-of-4-gib-as-it-says",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "connection-reset",
        &[
            "operation-none",
            "operation-unknown",
            "type-of-socket-unknown",
            "data-without-connection",
            "port-the-largest",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "dropped",
        &[
            "packet-of-another-guest",
            "packet-of-the-host",
            "packet-to-nobody",
            "reset-of-nothing",
        ],
    ),
    (
        "device=vsock queue=transmit",
        "served",
        &["flood-without-room"],
    ),
    (
        "device=balloon queue=inflate",
        "needs-reset",
        &[
            "page-behind-memory",
            "page-of-registers",
            "page-the-largest",
            "pages-good-then-bad",
            "page-number-in-half",
            "pages-too-many",
            "pages-of-a-megabyte",
        ],
    ),
    (
        "device=balloon queue=inflate",
        "served",
        &["page-again-and-again"],
    ),
    (
        "device=balloon queue=deflate",
        "served",
        &["taken-back-that-is-not"],
    ),
    (
        "device=balloon queue=reporting",
        "served",
        &["report-of-a-part-of-a-page"],
    ),
    ("device=rng", "served", &["table-without-the-feature"]),
    (
        "device=rng",
        "served",
        &["entropy-of-a-megabyte", "entropy-of-all-memory"],
    ),
    (
        "device=console queue=transmit",
        "served",
        &["output-of-a-megabyte"],
    ),
];
/// Attacks with packets that the network device drops and counts.
pub(super) const NET_DROPPED: [&str; 8] = [
    "net-header-alone",
    "frame-too-short",
    "frame-too-long",
    "frame-of-a-megabyte",
    "segmentation-unknown",
    "segments-of-no-size",
    "checksum-outside",
    "net-header-of-ones",
];

/// Outcomes by attack and target.
pub(super) type Outcomes = BTreeMap<String, String>;

/// Returns the report of an attack after which all other devices work, and the attacked one works after a reset.
fn lived_on(outcome: &str) -> String {
    format!("outcome={outcome} others={} again=yes", DEVICES.len() - 1)
}

pub(super) fn expected() -> Outcomes {
    let mut all = Outcomes::new();
    let mut expect = |attack: &str, target: &str, outcome: &str| {
        let key = format!("attack {attack} {target}");
        let before = all.insert(key, lived_on(outcome));
        assert_eq!(before, None, "{attack} {target} is expected twice");
    };
    for (device, queues) in DEVICES {
        let target = |queue: &str| format!("device={device} queue={queue}");
        for queue in queues {
            for attack in EVERY_QUEUE {
                expect(attack, &target(queue), "needs-reset");
            }
            if *queue != "events" {
                expect(WRONG_DIRECTION, &target(queue), "needs-reset");
            }
        }
        for attack in FIRST_QUEUE {
            expect(attack, &target(queues[0]), "needs-reset");
        }
        for attack in FIRST_QUEUE_IGNORED {
            expect(attack, &target(queues[0]), "ignored");
        }
        for attack in DEVICE_IGNORED {
            expect(attack, &format!("device={device}"), "ignored");
        }
        for (attack, outcome) in DEVICE_OTHER {
            expect(attack, &format!("device={device}"), outcome);
        }
    }
    for (target, outcome, attacks) in PARTICULAR {
        for attack in attacks {
            expect(attack, target, outcome);
        }
    }
    all
}

/// Returns the outcomes that the guest reports.
pub(super) fn reported(serial: &str) -> Outcomes {
    let mut all = Outcomes::new();
    for line in serial.lines().filter(|line| line.starts_with("attack ")) {
        let (attack, outcome) = line
            .split_once(" outcome=")
            .unwrap_or_else(|| panic!("an attack without an outcome: {line}"));
        let before = all.insert(attack.to_owned(), format!("outcome={outcome}"));
        assert_eq!(before, None, "twice: {line}");
    }
    all
}

pub(super) fn assert_same(found: &Outcomes, expected: &Outcomes) {
    let (mut wrong, mut missing) = (Vec::new(), Vec::new());
    for (attack, outcome) in found {
        match expected.get(attack) {
            Some(known) if known == outcome => {}
            Some(known) => wrong.push(format!("{attack}: {outcome}, expected {known}")),
            None => wrong.push(format!("{attack}: is not expected")),
        }
    }
    for attack in expected
        .keys()
        .filter(|attack| !found.contains_key(*attack))
    {
        missing.push(format!("{attack}: was not made"));
    }
    let count = wrong.len() + missing.len();
    let all = [wrong, missing].concat().join("\n");
    assert_eq!(count, 0, "wrong or missing:\n{all}");
}
