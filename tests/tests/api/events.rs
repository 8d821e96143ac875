//! Events of a guest on `--event-monitor`.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ferry_tests::dirtier::{LIMIT, PATIENT, assert_ends, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use ferry_tests::process::Process;
use ferry_tests::{api, dirtier, ferry, paths};
use serde_json::{Value, json};

use super::{READY, booted, call, config, inherit, kernel, put, sample};

/// Returns the names (`source/event`) and properties of the events in a file. Checks that timestamps never decrease.
fn events(file: &Path) -> Vec<(String, Value)> {
    let text = fs::read_to_string(file).unwrap();
    let mut last = Duration::ZERO;
    text.lines()
        .map(|line| {
            let event: Value = serde_json::from_str(line).unwrap();
            let stamp = &event["timestamp"];
            let nanos = u32::try_from(stamp["nanos"].as_u64().unwrap()).unwrap();
            let at = Duration::new(stamp["secs"].as_u64().unwrap(), nanos);
            assert!(at >= last, "{text}");
            last = at;
            let name = |field: &str| event[field].as_str().unwrap().to_owned();
            (
                format!("{}/{}", name("source"), name("event")),
                event["properties"].clone(),
            )
        })
        .collect()
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn the_events_of_a_life_come_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events");
    let option = format!("path={}", file.display());
    let mut ferry = Ferry::empty(&["--event-monitor", &option]).unwrap();
    let mut bad = config(1);
    bad["payload"]["kernel"] = json!("/no/such/kernel");
    put(&ferry, "vm.create", &bad.to_string());
    assert_eq!(call(&ferry, "PUT", "vm.boot", "").status, 500);
    put(&ferry, "vm.delete", "");
    booted(&ferry, 1);
    for name in [
        "vm.pause",
        "vm.resume",
        "vm.reboot",
        "vm.shutdown",
        "vm.delete",
    ] {
        put(&ferry, name, "");
    }
    put(&ferry, "vmm.shutdown", "");
    assert_ends(&mut ferry);
    let events = events(&file);
    assert_eq!(
        names(&events),
        [
            "vmm/starting",
            "vm/created",
            "vm/booting",
            "vm/failed",
            "vm/deleted",
            "vm/created",
            "vm/booting",
            "vm/booted",
            "vm/paused",
            "vm/resumed",
            "vm/rebooting",
            "vm/booting",
            "vm/booted",
            "vm/rebooted",
            "vm/shutdown",
            "vm/deleted",
            "vmm/shutdown",
        ]
    );
    let reason = events[3].1["reason"].as_str().unwrap();
    assert!(reason.contains("/no/such/kernel"), "{reason}");
}

#[test]
fn the_events_of_a_migration_come_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let [here, there] = ["here", "there"].map(|name| folder.path().join(name));
    let mut source = Ferry::empty(&["--event-monitor", here.to_str().unwrap()]).unwrap();
    booted(&source, 1);
    let nowhere = folder.path().join("nowhere");
    let refused = source.ctl(&["send-migration", &format!("unix:{}", nowhere.display())]);
    let refused = dirtier::refusal(refused.unwrap_err());
    let endpoint = Endpoint::free_tcp().unwrap();
    let option = ["--event-monitor", there.to_str().unwrap()];
    let mut destination = Ferry::receive_with(&endpoint, &option).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    assert_ends(&mut source);
    audit(&mut destination);
    let here = events(&here);
    let migration: Vec<_> = here
        .iter()
        .skip_while(|(name, _)| name != "vm/booted")
        .skip(1)
        .collect();
    let found: Vec<&str> = migration.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(found[..2], ["vm/migration-started", "vm/migration-failed"]);
    assert!(
        refused.contains(migration[1].1["reason"].as_str().unwrap()),
        "{migration:?}"
    );
    let phases: Vec<_> = migration[3..]
        .iter()
        .filter_map(|(_, properties)| properties["phase"].as_str())
        .collect();
    assert_eq!(found[2], "vm/migration-started");
    assert_eq!(phases, ["agreeing", "rounds", "switchover", "committed"]);
    assert_eq!(
        found[found.len() - 2..],
        ["vm/migration-finished", "vmm/shutdown"]
    );
    let finished = &migration[found.len() - 2].1;
    assert!(finished["bytes_sent"].as_u64().unwrap() > 0, "{finished}");
    let there = events(&there);
    let there = names(&there);
    assert_eq!(there[..2], ["vmm/starting", "vm/migration-receive-started"]);
    let tail = [
        "vm/migration-receive-finished",
        "vm/shutdown",
        "vmm/shutdown",
    ];
    assert_eq!(there[there.len() - 3..], tail);
}

#[test]
fn a_guests_own_end_is_told_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("events");
    let (kernel, option) = (kernel("hello.elf"), file.display().to_string());
    let arguments = [
        "run",
        "--kernel",
        &kernel,
        "--memory",
        "64M",
        "--event-monitor",
        &option,
    ];
    assert!(ferry::invoke(&arguments, LIMIT).unwrap().status.success());
    let events = events(&file);
    let tail = &events[events.len() - 2..];
    assert_eq!(names(tail), ["vm/shutdown", "vmm/shutdown"]);
    let reason = tail[0].1["reason"].as_str().unwrap();
    assert!(reason.contains("status 0"), "{reason}");
}

#[test]
fn a_reader_of_events_that_stalls_or_goes_stops_no_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let mut command = Command::new(paths::ferry().unwrap());
    let api = folder.path().join("api");
    inherit(&writer);
    command.args([
        "run",
        "--kernel",
        &kernel("dirtier.elf"),
        "--memory",
        "128M",
    ]);
    command.args([
        "--cmdline",
        "cpus=1 memory=48M cold=44M serial=on",
        "--serial",
        "stdio",
    ]);
    command.arg("--api-socket").arg(&api);
    command.args(["--event-monitor", &format!("fd={}", writer.as_raw_fd())]);
    let mut ferry = Process::start(&mut command).unwrap();
    drop(writer);
    ferry.stdout().wait_for(READY, LIMIT).unwrap();
    let put = |name: &str| {
        let answer = api::request(&api, "PUT", &format!("/api/v1/{name}"), "").unwrap();
        assert_eq!(answer.status, 204, "{answer:?}");
    };
    // More events than the pipe (64 KiB) and the queue of the monitor hold.
    for _ in 0..1500 {
        put("vm.pause");
        put("vm.resume");
    }
    let text = api::request(&api, "GET", "/metrics", "").unwrap().body;
    assert!(sample(&text, "ferry_events_lost_total") > 0.0, "{text}");
    drop(reader);
    put("vm.pause");
    put("vm.resume");
    let mark = ferry.stdout().mark();
    ferry.type_in("s").unwrap();
    ferry
        .stdout()
        .wait_after(mark, "dirtier: status", LIMIT)
        .unwrap();
    put("vmm.shutdown");
    assert!(ferry.wait(LIMIT).unwrap().status.success());
}
