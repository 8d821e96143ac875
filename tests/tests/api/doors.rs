//! Sockets and descriptors of the API and of the events, and clients that misbehave.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use ferry_tests::dirtier::{LIMIT, assert_ends};
use ferry_tests::ferry::Ferry;
use ferry_tests::process::Process;
use ferry_tests::{api, ferry, paths};

use super::{call, inherit, kernel};

#[test]
fn a_socket_that_was_left_open_for_it_is_answered_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    inherit(&listener);
    let mut command = Command::new(paths::ferry().unwrap());
    command.args([
        "run",
        "--api-socket",
        &format!("fd={}", listener.as_raw_fd()),
    ]);
    let mut ferry = Process::start(&mut command).unwrap();
    // The kernel queues connections until the monitor accepts them.
    let answer = api::request(&path, "GET", "/api/v1/vmm.ping", "").unwrap();
    assert!(
        answer.body.contains(&format!("\"pid\":{}", ferry.pid())),
        "{answer:?}"
    );
    api::request(&path, "PUT", "/api/v1/vmm.shutdown", "").unwrap();
    assert!(ferry.wait(LIMIT).unwrap().status.success());
    assert!(path.exists(), "the socket is not the monitor's to remove");
}

#[test]
fn descriptors_that_cannot_be_are_named() {
    let file = OwnedFd::from(File::open("/dev/null").unwrap());
    inherit(&file);
    let wrong = format!("fd={}", file.as_raw_fd());
    for (option, value, named) in [
        ("--api-socket", wrong.as_str(), wrong.as_str()),
        ("--api-socket", "fd=900", "fd=900"),
        ("--api-socket", "fd=1", "standard"),
        ("--api-socket", "fd=x", "--api-socket"),
        ("--event-monitor", "fd=900", "fd=900"),
        ("--event-monitor", "/no/such/folder/x", "/no/such/folder/x"),
    ] {
        let arguments = ["run", "--kernel", &kernel("hello.elf"), option, value];
        let ended = ferry::invoke(&arguments, LIMIT).unwrap();
        assert!(!ended.status.success(), "{ended:?}");
        assert!(
            ended.stderr.contains(named) && !ended.stderr.contains("panicked"),
            "{ended:?}"
        );
    }
}

#[test]
fn idle_and_slow_clients_do_not_lock_the_operator_out() {
    let mut ferry = Ferry::empty(&[]).unwrap();
    let connect = || UnixStream::connect(ferry.api_socket()).unwrap();
    let mut held: Vec<UnixStream> = (0..100).map(|_| connect()).collect();
    for stream in &mut held {
        // The monitor has closed some connections to make room.
        let _closed = stream.write_all(b"PUT /api/v1/vm.cre");
    }
    for _ in 0..3 {
        let began = Instant::now();
        assert_eq!(call(&ferry, "GET", "vmm.ping", "").status, 200);
        // This is far below the time limits for idle and slow clients.
        assert!(began.elapsed() < Duration::from_secs(4));
    }
    // The last slow client receives the reason before its connection closes.
    let mut last = held.pop().unwrap();
    last.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}
