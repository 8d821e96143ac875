//! Faults during a migration: injected by the proxy, or by killing a side.
//!
//! After each fault exactly one side runs the guest, no write is lost, and a second migration succeeds. Phases have the
//! names of the API.

use ferry_tests::api;
use ferry_tests::dirtier::{
    self, LIMIT, PATIENT, assert_ends, assert_none_runs, assert_only_runs, assert_runs, audit,
    refusal,
};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use ferry_tests::frames::Tag;
use ferry_tests::header::Change;
use ferry_tests::process::{self, Ended};
use ferry_tests::proxy::{Action, Direction, Fault, Proxy, Trigger};
use serde_json::json;

/// Number of vCPUs of the guests.
const CPUS: u32 = 2;
const UNCONFIRMED: &str = "handed-over-unconfirmed";

fn any_port() -> Endpoint {
    Endpoint::Tcp(([127, 0, 0, 1], 0).into())
}

/// Starts a destination, and a proxy in front of it that injects the fault.
fn broken(fault: Option<Fault>) -> (Ferry, Proxy) {
    broken_with(&[], fault)
}

fn broken_with(options: &[&str], fault: Option<Fault>) -> (Ferry, Proxy) {
    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive_with(&endpoint, options).unwrap();
    let proxy = Proxy::start(&any_port(), endpoint, fault.into_iter().collect()).unwrap();
    (destination, proxy)
}

fn at_frame(direction: Direction, tag: Tag, action: Action) -> Fault {
    Fault {
        direction,
        trigger: Trigger::Frame(tag, 0),
        action,
    }
}

fn cut_before(direction: Direction, tag: Tag) -> Fault {
    at_frame(direction, tag, Action::Cut)
}

/// Returns a fault that stalls before the acknowledgement of the first round, so that the rounds last until the test
/// resumes the proxy.
fn held_in_the_rounds() -> Fault {
    at_frame(Direction::ToSource, Tag::RoundAck, Action::Stall)
}

fn try_to_send(source: &Ferry, proxy: &Proxy) -> Ended {
    let target = proxy.endpoint().to_string();
    let call = [&["send-migration", &target][..], &PATIENT[1..]].concat();
    source.try_ctl(&call, LIMIT).unwrap()
}

/// Asserts that the call failed with this message and that the source still runs the guest.
fn assert_stayed(source: &mut Ferry, destination: &mut Ferry, answer: &Ended, words: &str) {
    assert!(!answer.status.success(), "{answer:?}");
    assert!(answer.stderr.contains(words), "no {words:?} in {answer:?}");
    assert_eq!(source.phase().unwrap(), "failed");
    assert_only_runs(source, destination);
    let resolve = source.ctl(&["migration-resolve", "resume"]).unwrap_err();
    let resolve = refusal(resolve);
    assert!(resolve.contains("nothing to resolve"), "{resolve}");
}

/// Migrates the guest to a new destination without a fault.
fn second_try_succeeds(source: Ferry) {
    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive(&endpoint).unwrap();
    arrives(source, destination, &endpoint);
}

/// Migrates the guest to `destination` and audits it there. Both processes end cleanly.
fn arrives(mut source: Ferry, mut destination: Ferry, endpoint: &Endpoint) {
    source.send_migration(endpoint, &PATIENT).unwrap();
    assert_ends(&mut source);
    assert_eq!(destination.phase().unwrap(), "completed");
    assert_only_runs(&mut destination, &mut source);
    audit(&mut destination);
}

/// Tests a fault before COMMIT: the call fails, and the source keeps running the guest.
fn source_survives(fault: Fault) {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(fault.clone()));
    let answer = try_to_send(&source, &proxy);
    assert_eq!(proxy.fired(), 1, "the fault was never met: {fault:?}");
    assert_stayed(&mut source, &mut destination, &answer, "not handed over");
    second_try_succeeds(source);
}

#[test]
fn a_cut_in_the_first_pages() {
    source_survives(cut_before(Direction::ToDestination, Tag::Pages));
}

#[test]
fn a_cut_at_the_end_of_a_round() {
    source_survives(cut_before(Direction::ToDestination, Tag::RoundEnd));
}

#[test]
fn a_cut_before_the_answer_to_a_round() {
    source_survives(cut_before(Direction::ToSource, Tag::RoundAck));
}

#[test]
fn a_cut_before_the_state() {
    source_survives(cut_before(Direction::ToDestination, Tag::State));
}

#[test]
fn a_cut_before_the_end_of_the_state() {
    source_survives(cut_before(Direction::ToDestination, Tag::Finish));
}

#[test]
fn a_cut_at_ready() {
    source_survives(cut_before(Direction::ToSource, Tag::Ready));
}

#[test]
fn a_cut_before_the_header_and_before_its_answer() {
    let trigger = Trigger::Offset(0);
    source_survives(Fault {
        direction: Direction::ToDestination,
        trigger,
        action: Action::Cut,
    });
    source_survives(cut_before(Direction::ToSource, Tag::Accept));
}

#[test]
fn a_silence_in_the_rounds_is_reported() {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    // The call returns because the source gives up. The proxy does not resume.
    let answer = try_to_send(&source, &proxy);
    assert_eq!(proxy.fired(), 1);
    assert_stayed(&mut source, &mut destination, &answer, "connection failed");
    second_try_succeeds(source);
}

/// Tries several faults with one source and one destination, because a refusal must harm neither.
fn all_refused(options: &[&str], faults: Vec<(Option<Fault>, &str)>) -> (Ferry, Ferry, Proxy) {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken_with(options, None);
    for (number, (fault, words)) in (1..).zip(faults) {
        let due = proxy.fired() + usize::from(fault.is_some());
        fault.into_iter().for_each(|fault| proxy.add(fault));
        let answer = try_to_send(&source, &proxy);
        assert_eq!(proxy.fired(), due, "fault {number} was never met");
        assert_stayed(&mut source, &mut destination, &answer, words);
    }
    (source, destination, proxy)
}

#[test]
fn one_flipped_bit_in_each_kind_of_frame_is_refused() {
    // There are no zero pages to flip: this guest has none, and unpopulated pages are not sent.
    let tags = [Tag::Pages, Tag::RoundEnd, Tag::State, Tag::Finish];
    let flips = tags.map(|tag| {
        let flip = at_frame(Direction::ToDestination, tag, Action::Flip(0x40));
        (Some(flip), "the destination refused")
    });
    let (source, destination, proxy) = all_refused(&[], flips.to_vec());
    arrives(source, destination, proxy.endpoint());
}

#[test]
fn one_flipped_bit_in_each_kind_of_answer_is_noticed() {
    for tag in [Tag::Accept, Tag::RoundAck, Tag::Ready] {
        source_survives(at_frame(Direction::ToSource, tag, Action::Flip(0x40)));
    }
}

#[test]
fn one_flipped_bit_in_the_header_is_refused() {
    let flip = |offset| {
        Some(Fault {
            direction: Direction::ToDestination,
            trigger: Trigger::Offset(offset),
            action: Action::Flip(0x10),
        })
    };
    let flips = vec![
        (flip(0), "a Ferry stream begins with"),
        (flip(8), "checksum"),
        (flip(15), "bytes, at most"),
        (flip(100), "checksum"),
    ];
    let (source, destination, proxy) = all_refused(&[], flips);
    arrives(source, destination, proxy.endpoint());
}

#[test]
fn another_version_and_another_layout_are_refused_in_words() {
    let rewrite = |change| {
        Some(Fault {
            direction: Direction::ToDestination,
            trigger: Trigger::Offset(0),
            action: Action::Rewrite(change),
        })
    };
    let field = |pointer, value| rewrite(Change::Field(pointer, value));
    let half = 64 << 20;
    let halves = json!([{"start": 0, "bytes": half}, {"start": half, "bytes": half}]);
    let changes = vec![
        (rewrite(Change::Version(9)), "stream version 9"),
        (field("/memory", halves), "laid out"),
        (field("/memory/0/start", json!(1)), "memory at 0x1"),
        (field("/memory", json!([])), "0 ranges of memory"),
        (field("/page_size", json!(16384)), "pages of 16384 bytes"),
        (field("/architecture", json!("riscv64")), "riscv64"),
        (field("/sections/0/version", json!(99)), "99"),
        (field("/cpus", json!(u32::MAX)), "4294967295 vCPUs"),
        (field("/populated_bytes", json!(1_u64 << 60)), "populated"),
    ];
    let (source, destination, proxy) = all_refused(&[], changes);
    arrives(source, destination, proxy.endpoint());
}

#[test]
fn a_destination_with_too_little_memory_refuses_in_words() {
    let limit = ["--memory-limit", "127M"];
    let too_much = (None, "128M of memory are more than --memory-limit 127M");
    let (source, destination, _proxy) = all_refused(&limit, vec![too_much]);
    drop(destination);
    second_try_succeeds(source);
}

#[test]
fn the_destination_is_killed_in_the_rounds() {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| try_to_send(&source, &proxy));
        assert!(proxy.wait_fired(1, LIMIT));
        destination.kill();
        proxy.resume();
        sending.join().unwrap()
    });
    assert_stayed(&mut source, &mut destination, &answer, "connection failed");
    second_try_succeeds(source);
}

#[test]
fn a_cancelled_migration_leaves_the_source_running() {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| try_to_send(&source, &proxy));
        assert!(proxy.wait_fired(1, LIMIT));
        assert_eq!(source.phase().unwrap(), "rounds");
        source.ctl(&["cancel-migration"]).unwrap();
        proxy.resume();
        sending.join().unwrap()
    });
    assert!(!answer.status.success(), "{answer:?}");
    assert!(answer.stderr.contains("cancelled"), "{answer:?}");
    assert_eq!(source.phase().unwrap(), "cancelled");
    assert_only_runs(&mut source, &mut destination);
    second_try_succeeds(source);
}

/// Tests the loss of COMMIT or of its confirmation: the source neither runs its guest nor does anything else with it
/// until
/// `migration-resolve` decides.
fn in_doubt(fault: Fault) -> (Ferry, Ferry) {
    let source = dirtier::start(CPUS);
    let (destination, proxy) = broken(Some(fault));
    let answer = try_to_send(&source, &proxy);
    assert_eq!(proxy.fired(), 1);
    assert!(!answer.status.success(), "{answer:?}");
    assert!(answer.stderr.contains("migration-resolve"), "{answer:?}");
    assert_eq!(source.phase().unwrap(), UNCONFIRMED);
    let elsewhere = any_port().to_string();
    for call in [
        &["resume"][..],
        &["pause"],
        &["shutdown"],
        &["send-migration", &elsewhere],
    ] {
        let said = refusal(source.ctl(call).unwrap_err());
        assert!(said.contains(UNCONFIRMED), "{call:?}: {said}");
    }
    (source, destination)
}

fn resume(source: &Ferry) {
    source.ctl(&["migration-resolve", "resume"]).unwrap();
    assert_eq!(source.phase().unwrap(), "failed");
}

#[test]
fn a_lost_commit_is_resolved_by_resuming_the_source() {
    let (mut source, mut destination) = in_doubt(cut_before(Direction::ToDestination, Tag::Commit));
    assert_none_runs([&mut source, &mut destination]);
    resume(&source);
    assert_only_runs(&mut source, &mut destination);
    second_try_succeeds(source);
}

#[test]
fn a_paused_guest_stays_paused_when_its_lost_commit_is_resolved() {
    let mut source = dirtier::start(CPUS);
    source.ctl(&["pause"]).unwrap();
    let lost = cut_before(Direction::ToDestination, Tag::Commit);
    let (mut destination, proxy) = broken(Some(lost));
    let answer = try_to_send(&source, &proxy);
    assert!(!answer.status.success(), "{answer:?}");
    resume(&source);
    assert_eq!(source.ctl_json(&["info"]).unwrap()["state"], "Paused");
    assert_none_runs([&mut source, &mut destination]);
    source.ctl(&["resume"]).unwrap();
    second_try_succeeds(source);
}

/// From the first round on, only a failed migration can make the source run its guest again. That includes the time
/// between the confirmation of the destination and the end of the source process.
#[test]
fn a_guest_that_leaves_cannot_be_resumed_at_the_source() {
    let source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    let socket = source.api_socket();
    let accepted = std::thread::scope(|scope| {
        let sending = scope.spawn(|| try_to_send(&source, &proxy));
        assert!(proxy.wait_fired(1, LIMIT));
        let resuming = scope.spawn(move || {
            let mut accepted = 0;
            // The calls fail when the process has ended.
            while let Ok(answer) = api::request(&socket, "PUT", "/api/v1/vm.resume", "") {
                accepted += usize::from(answer.status < 300);
            }
            accepted
        });
        proxy.resume();
        let answer = sending.join().unwrap();
        assert!(answer.status.success(), "{answer:?}");
        resuming.join().unwrap()
    });
    assert_eq!(accepted, 0, "the guest was run again where it had left");
    let mut source = source;
    assert_ends(&mut source);
    assert_only_runs(&mut destination, &mut source);
    audit(&mut destination);
}

/// SIGTERM during the rounds ends the guest at the source; it must not arrive at the destination.
#[test]
fn a_signal_in_the_rounds_cancels_and_ends_the_source() {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| try_to_send(&source, &proxy));
        assert!(proxy.wait_fired(1, LIMIT));
        process::terminate(source.pid()).unwrap();
        proxy.resume();
        sending.join().unwrap()
    });
    assert!(!answer.status.success(), "{answer:?}");
    assert_ends(&mut source);
    assert_none_runs([&mut source, &mut destination]);
    assert!(destination.is_running());
}

#[test]
fn a_signal_in_doubt_is_no_success() {
    let (mut source, _destination) = in_doubt(cut_before(Direction::ToDestination, Tag::Commit));
    process::terminate(source.pid()).unwrap();
    let ended = source.wait(LIMIT).unwrap();
    assert!(!ended.status.success(), "{ended:?}");
    assert!(ended.stderr.contains("unconfirmed"), "{ended:?}");
}

#[test]
fn a_damaged_commit_is_the_destinations_refusal() {
    // The migration is not in doubt: the destination reports that it does not run the guest.
    let flip = Action::Flip(0x40);
    source_survives(at_frame(Direction::ToDestination, Tag::Commit, flip));
}

#[test]
fn a_lost_done_is_resolved_by_discarding_the_source() {
    let (mut source, mut destination) = in_doubt(cut_before(Direction::ToSource, Tag::Done));
    assert_only_runs(&mut destination, &mut source);
    source.ctl(&["migration-resolve", "discard"]).unwrap();
    assert_ends(&mut source);
    // The guest can be migrated from there again.
    second_try_succeeds(destination);
}

#[test]
fn a_damaged_done_leaves_the_source_in_doubt() {
    let flip = at_frame(Direction::ToSource, Tag::Done, Action::Flip(0x40));
    let (mut source, mut destination) = in_doubt(flip);
    assert_only_runs(&mut destination, &mut source);
    source.ctl(&["migration-resolve", "discard"]).unwrap();
    assert_ends(&mut source);
    audit(&mut destination);
}

#[test]
fn a_destination_that_dies_with_the_commit_is_resolved_by_resuming_the_source() {
    let stall = at_frame(Direction::ToDestination, Tag::Commit, Action::Stall);
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(stall));
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| try_to_send(&source, &proxy));
        assert!(proxy.wait_fired(1, LIMIT));
        assert_eq!(source.phase().unwrap(), "committed");
        let late = refusal(source.ctl(&["cancel-migration"]).unwrap_err());
        assert!(late.contains("committed"), "{late}");
        destination.kill();
        proxy.cut();
        sending.join().unwrap()
    });
    assert!(!answer.status.success(), "{answer:?}");
    assert_eq!(source.phase().unwrap(), UNCONFIRMED);
    assert_none_runs([&mut source, &mut destination]);
    resume(&source);
    assert_runs(&mut source);
    second_try_succeeds(source);
}

#[test]
fn a_destination_that_is_not_there_is_named() {
    let mut source = dirtier::start(CPUS);
    let nowhere = Endpoint::free_tcp().unwrap();
    let said = refusal(source.send_migration(&nowhere, &[]).unwrap_err());
    let address = nowhere.to_string();
    assert!(said.contains(&address), "no {address} in {said}");
    assert_runs(&mut source);
    second_try_succeeds(source);
}

#[test]
fn a_guest_that_stays_too_long_in_the_rounds_stays() {
    let mut source = dirtier::start(CPUS);
    let (mut destination, proxy) = broken(Some(held_in_the_rounds()));
    let target = proxy.endpoint().to_string();
    let options = [
        "--downtime-ms",
        "1",
        "--timeout-s",
        "1",
        "--throttle-max",
        "0",
    ];
    let call = [&["send-migration", &target][..], &options].concat();
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| source.try_ctl(&call, LIMIT).unwrap());
        assert!(proxy.wait_fired(1, LIMIT));
        // The first round takes longer than the limit for all rounds, and the guest writes during it. The rest does
        // not fit into a millisecond at the bandwidth of that round.
        std::thread::sleep(std::time::Duration::from_millis(1500));
        proxy.resume();
        sending.join().unwrap()
    });
    assert_stayed(&mut source, &mut destination, &answer, "gave up");
    second_try_succeeds(source);
}
