//! Runs the dirtier (a bare-metal guest of ferry-guest-images) in `ferry`, and lets it audit the pages it wrote.
//!
//! The dirtier prints only on request. If it answers, the guest is running.

use std::thread;
use std::time::{Duration, Instant};

use crate::ferry::{Ferry, FerryError};
use crate::machine::Machine;
use crate::paths;

/// Time limit for an answer of the guest and for the end of a process. Both take less than a second on an idle native
/// host, but far longer in the lab or on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);
/// How long tests wait for output of a guest that must not run, after the other guest has answered.
const SILENCE: Duration = Duration::from_millis(400);
/// `send-migration` with options with which a migration completes on any host: it compares digests, and its downtime
/// limit is one that the lab can keep.
pub const PATIENT: [&str; 3] = ["--verify", "--downtime-ms", "5000"];
const READY: &str = "dirtier: ready";

/// Command line of the guest: it rewrites 4 MiB at full speed and leaves 44 MiB constant.
const WORK: &str = "memory=48M cold=44M serial=on";

/// Starts a monitor and waits until its guest, with `cpus` vCPUs, has populated its memory and begun to rewrite it.
///
/// # Panics
/// Panics if the guest does not start.
pub fn start(cpus: u32) -> Ferry {
    let machine = Machine {
        kernel: paths::guest("dirtier.elf").unwrap_or_else(|error| panic!("{error}")),
        initramfs: None,
        cmdline: format!("cpus={cpus} {WORK}"),
        memory_mib: 128,
        cpus,
    };
    let ferry = Ferry::run(&machine).unwrap_or_else(|error| panic!("{error}"));
    let ready = ferry.serial().wait_for(READY, LIMIT);
    ready.unwrap_or_else(|error| panic!("{error}"));
    ferry
}

/// Asserts that the guest runs: it answers, and its count of writes grows.
///
/// # Panics
/// Panics if it does not run.
pub fn assert_runs(side: &mut Ferry) {
    let first = pages_written(side);
    let deadline = Instant::now() + LIMIT;
    while pages_written(side) <= first {
        assert!(
            Instant::now() < deadline,
            "the guest answers but does not write"
        );
    }
}

/// Asserts that the guest runs on one side and that the other side is silent: ended, empty or paused.
///
/// # Panics
/// Panics if the guest runs on neither side or on both.
pub fn assert_only_runs(here: &mut Ferry, other: &mut Ferry) {
    let before = other.serial().mark();
    // Typing fails if the process has ended. An ended process is silent.
    let _gone = other.type_in("s");
    assert_runs(here);
    thread::sleep(SILENCE);
    let said = other.serial().text_after(before);
    assert!(
        said.is_empty(),
        "the guest runs twice; there it says: {said}"
    );
}

/// Asserts that the guest runs on neither side.
///
/// # Panics
/// Panics if the guest answers on one of them.
pub fn assert_none_runs(sides: [&mut Ferry; 2]) {
    let marked = sides.map(|side| {
        let before = side.serial().mark();
        let _gone = side.type_in("s");
        (side.serial().clone(), before)
    });
    thread::sleep(SILENCE);
    for (console, before) in marked {
        let said = console.text_after(before);
        assert!(
            said.is_empty(),
            "a guest that must stand still says: {said}"
        );
    }
}

/// Lets the guest check every page that it ever wrote. The guest and its monitor end after that.
///
/// # Panics
/// Panics if a write was lost, or if the monitor does not end cleanly.
pub fn audit(side: &mut Ferry) {
    side.type_in("q").unwrap_or_else(|error| panic!("{error}"));
    let said = assert_ends(side);
    assert!(said.contains("dirtier: audit passed"), "{said}");
}

/// Waits for the process to end with status 0 and to remove its socket. Returns its output.
///
/// # Panics
/// Panics if it does not.
pub fn assert_ends(side: &mut Ferry) -> String {
    let ended = side.wait(LIMIT).unwrap_or_else(|error| panic!("{error}"));
    assert!(ended.status.success(), "{ended:?}");
    let socket = side.api_socket();
    assert!(!socket.exists(), "left behind: {}", socket.display());
    ended.stdout
}

/// Returns the message with which the monitor refused a call.
///
/// # Panics
/// Panics if the call failed for another reason.
pub fn refusal(error: FerryError) -> String {
    match error {
        FerryError::Call { output, .. } => output,
        other => panic!("{other}"),
    }
}

fn pages_written(side: &mut Ferry) -> u64 {
    let mark = side.serial().mark();
    side.type_in("s").unwrap_or_else(|error| panic!("{error}"));
    let answer = side.serial().wait_after(mark, STATUS, LIMIT);
    answer.unwrap_or_else(|error| panic!("{error}"));
    let began = Instant::now();
    loop {
        // The mark can lie within an earlier line, and the answer can arrive in pieces.
        let text = side.serial().text_after(mark);
        let line = text
            .split_once(STATUS)
            .and_then(|(_, rest)| rest.split_once('\n'));
        if let Some((line, _)) = line {
            return pages(line).unwrap_or_else(|| panic!("no count of pages in {text:?}"));
        }
        assert!(began.elapsed() < LIMIT, "half a status: {text:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Prefix of a status line.
const STATUS: &str = "dirtier: status ";

fn pages(status: &str) -> Option<u64> {
    status
        .split_whitespace()
        .find_map(|field| field.strip_prefix("pages="))?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_of_pages_is_found_in_a_status() {
        assert_eq!(pages("passes=3 pages=12345 lost=0 torn=0"), Some(12345));
        assert_eq!(pages("passes=3 lost=0 torn=0"), None);
    }
}
