//! The project's dirtier as the guest of a test: started, asked, and made to audit what it wrote.
//!
//! It prints only when it is asked, so output that grows is a guest that runs.

use std::thread;
use std::time::{Duration, Instant};

use crate::ferry::{Ferry, FerryError};
use crate::machine::Machine;
use crate::paths;

/// A guest's answer, or a process's end. Nothing takes a second; the lab and a busy machine may.
pub const LIMIT: Duration = Duration::from_secs(60);
/// How long a guest that must not run is listened to, once the other has answered.
const SILENCE: Duration = Duration::from_millis(400);
/// Options of a migration that is to come to its end on any host: the digests are compared, and the downtime
/// is one that the lab keeps, too.
pub const PATIENT: [&str; 3] = ["--verify", "--downtime-ms", "5000"];
const READY: &str = "dirtier: ready";

/// What the guests of the whole-system tests do: 4 MiB rewritten at full speed, 44 MiB constant.
const WORK: &str = "memory=48M cold=44M serial=on";

/// A running monitor whose guest has populated its memory and rewrites it on so many vCPUs.
///
/// # Panics
/// Where it does not come up.
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

/// The guest answers here, and writes on.
///
/// # Panics
/// Where it does not.
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

/// The guest runs on this side, and the other side is silent: gone, empty or stopped.
///
/// # Panics
/// Where it runs on neither or on both.
pub fn assert_only_runs(here: &mut Ferry, other: &mut Ferry) {
    let before = other.serial().mark();
    // A process that has ended takes no input, which is as silent as can be.
    let _gone = other.type_in("s");
    assert_runs(here);
    thread::sleep(SILENCE);
    let said = other.serial().text_after(before);
    assert!(
        said.is_empty(),
        "the guest runs twice; there it says: {said}"
    );
}

/// The guest runs on neither side.
///
/// # Panics
/// Where it answers on one of them.
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

/// Lets the guest look at every page that it ever wrote; it ends itself, and the monitor with it.
///
/// # Panics
/// Where anything was lost, or something is left over.
pub fn audit(side: &mut Ferry) {
    side.type_in("q").unwrap_or_else(|error| panic!("{error}"));
    let said = assert_ends(side);
    assert!(said.contains("dirtier: audit passed"), "{said}");
}

/// The process ends with status 0 and leaves no socket. Returns what it wrote.
///
/// # Panics
/// Where it does not.
pub fn assert_ends(side: &mut Ferry) -> String {
    let ended = side.wait(LIMIT).unwrap_or_else(|error| panic!("{error}"));
    assert!(ended.status.success(), "{ended:?}");
    let socket = side.api_socket();
    assert!(!socket.exists(), "left behind: {}", socket.display());
    ended.stdout
}

/// How the call failed, in words.
///
/// # Panics
/// Where it failed in another way than by the monitor's refusal.
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
        // The mark may be in the middle of an earlier line, and the answer may come in pieces.
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

/// What a status line begins with.
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
