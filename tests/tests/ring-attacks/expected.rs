//! What is to come of each attack, and how that differs from what the guest says.

use std::collections::BTreeMap;

/// Devices, in the order in which they are found, and their queues by number.
const DEVICES: [(&str, &[&str]); 6] = [
    ("block", &["requests"]),
    ("net", &["receive", "transmit"]),
    ("rng", &["requests"]),
    ("vsock", &["receive", "transmit", "events"]),
    ("balloon", &["inflate", "deflate", "reporting"]),
    ("console", &["receive", "transmit"]),
];
/// Attacks on every queue, all of which need a reset.
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
/// On every queue but that for events of sockets, which are looked at only when there is one.
const WRONG_DIRECTION: &str = "wrong-direction";

/// Attacks on the first queue of each device while it is set up, which need a reset.
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
/// Attacks on the first queue of each device, of which nothing comes.
const FIRST_QUEUE_IGNORED: [&str; 5] = [
    "size-is-none",
    "size-is-no-power-of-two",
    "size-above-the-most",
    "size-above-16-bits",
    "ready-before-the-features",
];

/// Attacks on the registers of each device, of which nothing comes.
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
/// Attacks on each device at work: what comes of them.
const DEVICE_OTHER: [(&str, &str); 4] = [
    ("event-index-of-nonsense", "served"),
    ("queue-taken-back-under-load", "quiet"),
    ("reset-under-load", "quiet"),
    ("rings-rewritten-under-load", "survived"),
];

/// Attacks that only one kind of device knows: where, what comes of them, which.
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
/// Packets that are not sent, as is counted.
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

/// Attack and target, with what comes of it.
pub(super) type Outcomes = BTreeMap<String, String>;

/// The other devices work, and the attacked one does after a reset.
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

/// What the guest says of its attacks.
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
