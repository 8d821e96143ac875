//! The API from outside: by a client that nobody here wrote, by curl, and by clients that misbehave; the events; and the
//! views of it, `ferry ctl` and `ferry top`. All of it holds on every host with a KVM.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{
    ConsoleMode, CpusConfig, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig,
    VmResize, VmState,
};
use cloud_hypervisor_client::socket_based_api_client;
use ferry_tests::api::{self, Answer};
use ferry_tests::dirtier::{self, LIMIT, PATIENT, assert_ends, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::process::{self, Process};
use ferry_tests::{paths, tap};
use serde_json::{Value, json};

/// What the dirtier says once it writes.
const READY: &str = "dirtier: ready";
/// The pages that it writes to, at most: 48 MiB, and what else there is of it.
const PAGES_MOST: u64 = 13_000;

fn kernel(name: &str) -> String {
    paths::guest(name).unwrap().display().to_string()
}

/// The dirtier's configuration, its serial port on the monitor's own input and output.
fn config(cpus: u32) -> Value {
    json!({
        "cpus": { "boot_vcpus": cpus, "max_vcpus": cpus },
        "memory": { "size": 128 << 20 },
        "payload": {
            "kernel": kernel("dirtier.elf"),
            "cmdline": format!("cpus={cpus} memory=48M cold=44M serial=on"),
        },
        "serial": { "mode": "Tty" },
    })
}

fn call(ferry: &Ferry, method: &str, name: &str, body: &str) -> Answer {
    let path = format!("/api/v1/{name}");
    api::request(&ferry.api_socket(), method, &path, body).unwrap()
}

fn put(ferry: &Ferry, name: &str, body: &str) {
    let answer = call(ferry, "PUT", name, body);
    assert_eq!(answer.status, 204, "{name}: {answer:?}");
}

fn get(ferry: &Ferry, name: &str) -> Value {
    let answer = call(ferry, "GET", name, "");
    assert_eq!(answer.status, 200, "{name}: {answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

/// A guest that was created and booted by calls, and writes.
fn booted(ferry: &Ferry, cpus: u32) {
    let mark = ferry.serial().mark();
    put(ferry, "vm.create", &config(cpus).to_string());
    put(ferry, "vm.boot", "");
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
}

fn status(error: &Error) -> u16 {
    match error {
        Error::Api(answer) => answer.code.as_u16(),
        other => panic!("{other}"),
    }
}

fn body(error: &Error) -> &str {
    match error {
        Error::Api(answer) => &answer.body,
        other => panic!("{other}"),
    }
}

#[test]
fn the_client_of_cloud_hypervisor_drives_a_guest_through_its_life() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut ferry = Ferry::empty(&[]).unwrap();
    runtime.block_on(drive(&mut ferry));
    assert_ends(&mut ferry);
}

fn clients_config() -> VmConfig {
    let payload = PayloadConfig {
        kernel: Some(kernel("dirtier.elf")),
        cmdline: Some("cpus=2 memory=48M cold=44M serial=on".to_owned()),
        ..PayloadConfig::new()
    };
    VmConfig {
        cpus: Some(CpusConfig::new(2, 2)),
        memory: Some(MemoryConfig::new(128 << 20)),
        serial: Some(SerialConfig::new(ConsoleMode::Tty)),
        ..VmConfig::new(payload)
    }
}

async fn drive(ferry: &mut Ferry) {
    let client = socket_based_api_client(ferry.api_socket());
    assert_eq!(
        client.vmm_ping_get().await.unwrap().pid,
        Some(i64::from(ferry.pid()))
    );
    assert_eq!(status(&client.vm_info_get().await.unwrap_err()), 404);
    assert_eq!(status(&client.boot_vm().await.unwrap_err()), 404);
    let unsupported = VmConfig {
        disks: Some(vec![DiskConfig::default()]),
        serial: Some(SerialConfig::new(ConsoleMode::Pty)),
        ..clients_config()
    };
    assert_eq!(
        status(&client.create_vm(unsupported).await.unwrap_err()),
        400
    );
    client.create_vm(clients_config()).await.unwrap();
    let again = client.create_vm(clients_config()).await.unwrap_err();
    assert_eq!(status(&again), 409, "{again}");
    let info = client.vm_info_get().await.unwrap();
    assert_eq!(info.state, VmState::Created);
    assert_eq!(info.config.cpus.unwrap().boot_vcpus, 2);
    assert_eq!(status(&client.pause_vm().await.unwrap_err()), 405);

    client.boot_vm().await.unwrap();
    ferry.serial().wait_for(READY, LIMIT).unwrap();
    let info = client.vm_info_get().await.unwrap();
    assert_eq!(
        (info.state, info.memory_actual_size),
        (VmState::Running, Some(128 << 20))
    );
    dirtier::assert_runs(ferry);

    client.pause_vm().await.unwrap();
    assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Paused);
    let counters = client.vm_counters_get().await.unwrap();
    assert!(counters["vcpu1"]["stops"] >= 1, "{counters:?}");
    // The kernel was written into the guest's memory by the monitor.
    assert!(
        counters["tracker"]["dirtied_by_monitor_pages"] > 0,
        "{counters:?}"
    );
    client.resume_vm().await.unwrap();
    dirtier::assert_runs(ferry);

    client.shutdown_vm().await.unwrap();
    assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Shutdown);
    assert_eq!(status(&client.shutdown_vm().await.unwrap_err()), 405);
    let mark = ferry.serial().mark();
    client.boot_vm().await.unwrap();
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
    let mark = ferry.serial().mark();
    client.reboot_vm().await.unwrap();
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
    client.power_button_vm().await.unwrap();
    let unknown = client.vm_resize_disk_put(Default::default()).await;
    let unknown = unknown.unwrap_err();
    assert_eq!(status(&unknown), 501);
    assert!(body(&unknown).contains("vm.resize-disk"), "{unknown}");
    let no_balloon = client.vm_resize_put(VmResize {
        desired_balloon: Some(0),
        ..VmResize::new()
    });
    let no_balloon = no_balloon.await.unwrap_err();
    assert_eq!(status(&no_balloon), 400);
    assert!(body(&no_balloon).contains("has no balloon"), "{no_balloon}");
    client.delete_vm().await.unwrap();
    assert_eq!(status(&client.vm_info_get().await.unwrap_err()), 404);
    client.shutdown_vmm().await.unwrap();
}

/// One call by curl: the status, and the answer's body.
fn curl(socket: &Path, method: &str, name: &str, body: &str) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--max-time",
        "60",
        "--unix-socket",
    ]);
    command.arg(socket);
    command.args(["--request", method, "--write-out", "\n%{http_code}"]);
    if !body.is_empty() {
        command.args(["--header", "Content-Type: application/json", "--data", body]);
    }
    command.arg(format!("http://localhost/api/v1/{name}"));
    let ended = process::run(&mut command, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let (body, status) = ended.stdout.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn curl_drives_a_guest_through_its_life() {
    let mut ferry = Ferry::empty(&[]).unwrap();
    let socket = ferry.api_socket();
    let config = config(1).to_string();
    for (method, name, body, status, named) in [
        ("GET", "vmm.ping", "", 200, "\"version\""),
        ("PUT", "vm.create", config.as_str(), 204, ""),
        ("GET", "vm.info", "", 200, "\"Created\""),
        ("PUT", "vm.boot", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Running\""),
        ("PUT", "vm.pause", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Paused\""),
        ("PUT", "vm.resume", "", 204, ""),
        ("GET", "vm.counters", "", 200, "\"vcpu0\""),
        (
            "PUT",
            "vm.dirty-rate",
            "{\"interval_ms\":50}",
            200,
            "\"pages_per_s\"",
        ),
        ("PUT", "vm.shutdown", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Shutdown\""),
        ("PUT", "vm.delete", "", 204, ""),
        ("GET", "vm.info", "", 404, "no guest"),
        ("PUT", "vm.add-disk", "{}", 501, "vm.add-disk"),
        ("PUT", "vmm.shutdown", "", 204, ""),
    ] {
        let (found, text) = curl(&socket, method, name, body);
        assert_eq!(found, status, "{method} {name}: {text}");
        assert!(text.contains(named), "{method} {name}: {text}");
    }
    assert_ends(&mut ferry);
}

#[test]
fn the_balloons_size_is_changed_while_the_guest_runs_and_lasts_over_a_reboot() {
    const MIB: u64 = 1 << 20;
    let mut config = config(1);
    config["balloon"] = json!({ "size": 4 * MIB });
    let ferry = Ferry::empty(&[]).unwrap();
    let resize = |bytes: u64| {
        let body = json!({ "desired_balloon": bytes }).to_string();
        call(&ferry, "PUT", "vm.resize", &body)
    };
    assert_eq!(resize(MIB).status, 404);
    assert_eq!(
        call(&ferry, "PUT", "vm.create", &config.to_string()).status,
        204
    );
    assert_eq!(resize(MIB).status, 405);
    assert_eq!(call(&ferry, "PUT", "vm.boot", "").status, 204);
    let target = || {
        let info: Value = serde_json::from_str(&call(&ferry, "GET", "vm.info", "").body).unwrap();
        // The guest has no driver for it, and so it keeps all its memory.
        assert_eq!(info["memory_actual_size"], info["config"]["memory"]["size"]);
        info["config"]["balloon"]["size"].as_u64().unwrap()
    };
    assert_eq!(target(), 4 * MIB);
    assert_eq!(resize(16 * MIB).status, 204);
    assert_eq!(target(), 16 * MIB);
    let memory = config["memory"]["size"].as_u64().unwrap();
    for impossible in [4097, memory, u64::MAX] {
        let answer = resize(impossible);
        assert_eq!(answer.status, 400);
        assert!(answer.body.contains("desired_balloon: "), "{answer:?}");
    }
    let more = call(
        &ferry,
        "PUT",
        "vm.resize",
        r#"{"desired_vcpus":2,"desired_balloon":0}"#,
    );
    assert_eq!(more.status, 400);
    assert!(more.body.contains("desired_vcpus"), "{more:?}");
    assert_eq!(call(&ferry, "PUT", "vm.reboot", "").status, 204);
    assert_eq!(target(), 16 * MIB);
    let socket = ferry.api_socket();
    let ctl = [
        "ctl",
        "--api-socket",
        &socket.to_string_lossy(),
        "resize",
        "--balloon",
        "0",
    ]
    .map(str::to_owned);
    let ctl = ctl.each_ref().map(String::as_str);
    let ended = ferry_tests::ferry::invoke(&ctl, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(target(), 0);
}

#[test]
fn a_tap_comes_with_the_call_and_serves_the_guest_in_each_of_its_lives() {
    let mut config = config(1);
    config["net"] = json!([{}]);
    let body = config.to_string();
    let ferry = Ferry::empty(&[]).unwrap();
    let create = |descriptors: &[BorrowedFd<'_>]| {
        let path = "/api/v1/vm.create";
        api::request_with(&ferry.api_socket(), "PUT", path, &body, descriptors).unwrap()
    };
    let put = |name: &str| call(&ferry, "PUT", name, "");
    let null = File::open("/dev/null").unwrap();
    let tap = tap::open_apart("ferry-passed").unwrap();
    for (descriptors, why) in [
        (&[][..], "net[0].tap: "),
        (&[tap.as_fd(), tap.as_fd()], "net: 2 descriptors"),
    ] {
        let answer = create(descriptors);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.body.contains(why), "{answer:?}");
    }
    assert_eq!(create(&[null.as_fd()]).status, 204);
    let answer = put("vm.boot");
    assert_eq!(answer.status, 500);
    assert!(answer.body.contains("it is no tap"), "{answer:?}");
    assert_eq!(put("vm.delete").status, 204);

    assert_eq!(create(&[tap.as_fd()]).status, 204);
    drop(tap);
    for next in [
        "vm.boot",
        "vm.reboot",
        "vm.shutdown",
        "vm.boot",
        "vm.delete",
    ] {
        let answer = put(next);
        assert_eq!(answer.status, 204, "{next}: {answer:?}");
    }
}

#[test]
fn a_configuration_is_refused_with_the_fields_path_and_nothing_is_created() {
    let ferry = Ferry::empty(&[]).unwrap();
    let payload = format!(r#""payload":{{"kernel":"{}"}}"#, kernel("hello.elf"));
    for (rest, named) in [
        (r#","fs":[]"#, "fs"),
        (r#","memory":{"size":1,"zones":[]}"#, "memory.zones"),
        (r#","memory":{"size":-1}"#, "memory.size"),
        (
            r#","cpus":{"boot_vcpus":1,"max_vcpus":2}"#,
            "cpus.max_vcpus",
        ),
        (r#","serial":{"mode":"Pty"}"#, "serial.mode"),
        (",", "trailing comma"),
        (r#","serial":{"mode":"File"}"#, "serial.file"),
    ] {
        let answer = call(&ferry, "PUT", "vm.create", &format!("{{{payload}{rest}}}"));
        assert_eq!(answer.status, 400, "{rest}: {answer:?}");
        let messages: Vec<String> = serde_json::from_str(&answer.body).unwrap();
        assert!(messages[0].starts_with(named), "{rest}: {messages:?}");
        assert_eq!(call(&ferry, "GET", "vm.info", "").status, 404);
    }
    let answer = call(&ferry, "PUT", "vm.create", r#"{"payload":{}}"#);
    assert!(
        answer.status == 400 && answer.body.contains("payload.kernel"),
        "{answer:?}"
    );
}

#[test]
fn a_guest_that_cannot_be_started_stays_off_and_can_be_started_once_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let later = folder.path().join("kernel");
    let mut ferry = Ferry::empty(&[]).unwrap();
    let mut config = config(1);
    config["payload"]["kernel"] = json!(later);
    put(&ferry, "vm.create", &config.to_string());
    let answer = call(&ferry, "PUT", "vm.boot", "");
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(answer.body.contains(later.to_str().unwrap()), "{answer:?}");
    assert_eq!(get(&ferry, "vm.info")["state"], "Created");
    fs::copy(kernel("dirtier.elf"), &later).unwrap();
    put(&ferry, "vm.boot", "");
    ferry.serial().wait_for(READY, LIMIT).unwrap();
    fs::remove_file(&later).unwrap();
    let answer = call(&ferry, "PUT", "vm.reboot", "");
    assert_eq!(answer.status, 500, "{answer:?}");
    assert_eq!(get(&ferry, "vm.info")["state"], "Shutdown");
    put(&ferry, "vmm.shutdown", "");
    assert_ends(&mut ferry);
}

#[test]
fn a_guest_that_was_shut_down_gives_its_memory_back_and_starts_anew() {
    let mut ferry = Ferry::empty(&[]).unwrap();
    booted(&ferry, 2);
    let on = ferry.resident().unwrap().shared_kib;
    assert!(on >= 48 * 1024, "{on}");
    put(&ferry, "vm.shutdown", "");
    let off = ferry.resident().unwrap().shared_kib;
    assert!(off < 1024, "{off}");
    let mark = ferry.serial().mark();
    put(&ferry, "vm.boot", "");
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
    audit(&mut ferry);
}

#[test]
fn a_guest_that_calls_created_is_carried_like_any_other() {
    let mut source = Ferry::empty(&[]).unwrap();
    booted(&source, 2);
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut destination = Ferry::receive(&endpoint).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    assert_ends(&mut source);
    // It was launched elsewhere: here it can be switched off, but not on again.
    dirtier::assert_runs(&mut destination);
    put(&destination, "vm.shutdown", "");
    let answer = call(&destination, "PUT", "vm.boot", "");
    assert_eq!(answer.status, 409, "{answer:?}");
    put(&destination, "vm.delete", "");
    put(&destination, "vmm.shutdown", "");
    assert_ends(&mut destination);
}

fn dirty_rate(ferry: &Ferry, interval_ms: u64) -> Value {
    let wish = json!({ "interval_ms": interval_ms }).to_string();
    let answer = call(ferry, "PUT", "vm.dirty-rate", &wish);
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

#[test]
fn the_dirty_rate_is_what_the_guest_writes_and_costs_it_nothing_it_wrote() {
    for log in ["get", "get-clear", "initially-set"] {
        let mut ferry = Ferry::empty(&["--dirty-log", log]).unwrap();
        booted(&ferry, 1);
        let rate = dirty_rate(&ferry, 300);
        let pages = rate["pages"].as_u64().unwrap();
        assert!(pages > 0 && pages < PAGES_MOST, "{log}: {rate}");
        assert!(
            rate["sources"]["vcpu"].as_f64().unwrap() > 0.0,
            "{log}: {rate}"
        );
        // A guest that stands writes nothing, and what it wrote before is not counted again.
        ferry.ctl(&["pause"]).unwrap();
        let still = dirty_rate(&ferry, 50);
        assert_eq!(still["pages"], 0, "{log}: {still}");
        ferry.ctl(&["resume"]).unwrap();
        let printed = ferry
            .ctl_json(&["dirty-rate", "--interval-ms", "100"])
            .unwrap();
        assert!(printed["pages"].as_u64().unwrap() > 0, "{log}: {printed}");
        // The log is whole for whoever uses it next.
        let endpoint = Endpoint::free_tcp().unwrap();
        let mut destination = Ferry::receive(&endpoint).unwrap();
        ferry.send_migration(&endpoint, &PATIENT).unwrap();
        assert_ends(&mut ferry);
        audit(&mut destination);
    }
}

#[test]
fn a_measurement_gives_way_to_a_migration_and_to_the_guests_end() {
    let mut ferry = dirtier::start(2);
    let measuring = |ferry: &Ferry| {
        let socket = ferry.api_socket();
        let began = Instant::now();
        let measuring = thread::spawn(move || {
            let body = r#"{"interval_ms":60000}"#;
            let ask = || api::request(&socket, "PUT", "/api/v1/vm.dirty-rate", body).unwrap();
            // One of those that look whether it has begun may be at work itself.
            let mut answer = ask();
            while answer.body.contains("another measurement") {
                answer = ask();
            }
            answer
        });
        // It has begun once another one is refused.
        while call(ferry, "PUT", "vm.dirty-rate", r#"{"interval_ms":10}"#).status != 409 {
            assert!(began.elapsed() < LIMIT);
        }
        measuring
    };
    let interrupted = |measuring: thread::JoinHandle<Answer>| {
        let answer = measuring.join().unwrap();
        assert_eq!(answer.status, 409, "{answer:?}");
        assert!(answer.body.contains("came between"), "{answer:?}");
    };
    let first = measuring(&ferry);
    put(&ferry, "vm.reboot", "");
    interrupted(first);
    dirtier::assert_runs(&mut ferry);
    let second = measuring(&ferry);
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut destination = Ferry::receive(&endpoint).unwrap();
    ferry.send_migration(&endpoint, &PATIENT).unwrap();
    interrupted(second);
    assert_ends(&mut ferry);
    audit(&mut destination);
}

/// A sample's value in Prometheus' text format.
fn sample(text: &str, name: &str) -> f64 {
    let found: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .collect();
    assert_eq!(found.len(), 1, "{name}: {text}");
    found[0]
}

#[test]
fn the_metrics_are_those_of_the_calls() {
    let mut ferry = dirtier::start(2);
    ferry.ctl(&["pause"]).unwrap();
    dirty_rate(&ferry, 10);
    let counters = get(&ferry, "vm.counters");
    let answer = api::request(&ferry.api_socket(), "GET", "/metrics", "").unwrap();
    assert_eq!(answer.status, 200);
    let text = answer.body;
    assert_eq!(sample(&text, r#"ferry_vm_state{state="paused"}"#), 1.0);
    assert_eq!(sample(&text, r#"ferry_vm_state{state="running"}"#), 0.0);
    assert_eq!(sample(&text, "ferry_vm_vcpus"), 2.0);
    assert_eq!(sample(&text, "ferry_vm_memory_bytes"), f64::from(128 << 20));
    for source in ["vcpu", "monitor", "device"] {
        let pages = sample(
            &text,
            &format!("ferry_dirtied_pages_total{{source=\"{source}\"}}"),
        );
        let counted = &counters["tracker"][format!("dirtied_by_{source}_pages")];
        assert_eq!(Some(pages), counted.as_f64(), "{source}");
    }
    let stops = sample(&text, r#"ferry_vcpu_stops_total{vcpu="1"}"#);
    assert_eq!(Some(stops), counters["vcpu1"]["stops"].as_f64());
    assert_eq!(
        ferry.ctl(&["metrics"]).unwrap().lines().count(),
        text.lines().count()
    );
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}

/// The events in a file, as `source/event`; each line is looked at.
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
    // More than the pipe's 64 KiB and the monitor's queue hold.
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

/// Lets children of this process have the descriptor, too.
fn inherit(descriptor: &OwnedFd) {
    rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
}

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
    // Connections are queued by the kernel until it is up.
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
        // Some have been closed to make room.
        let _closed = stream.write_all(b"PUT /api/v1/vm.cre");
    }
    for _ in 0..3 {
        let began = Instant::now();
        assert_eq!(call(&ferry, "GET", "vmm.ping", "").status, 200);
        // Long before any limit for idle or slow clients.
        assert!(began.elapsed() < Duration::from_secs(4));
    }
    // The last of the slow ones is told why it is closed.
    let mut last = held.pop().unwrap();
    last.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = String::new();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}

#[test]
fn ctl_drives_a_guest_through_its_life() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.json");
    fs::write(&file, config(1).to_string()).unwrap();
    let mut ferry = Ferry::empty(&[]).unwrap();
    ferry.ctl(&["create", file.to_str().unwrap()]).unwrap();
    ferry.ctl(&["boot"]).unwrap();
    ferry.serial().wait_for(READY, LIMIT).unwrap();
    let counters = ferry.ctl_json(&["counters"]).unwrap();
    assert!(counters["vcpu0"]["stops"].is_u64(), "{counters}");
    ferry.ctl(&["shutdown"]).unwrap();
    assert_eq!(ferry.ctl_json(&["info"]).unwrap()["state"], "Shutdown");
    ferry.ctl(&["delete"]).unwrap();
    let refused = dirtier::refusal(ferry.ctl(&["info"]).unwrap_err());
    assert!(refused.contains("no guest"), "{refused}");
    let missing = ferry.try_ctl(&["create", "/no/such/file"], LIMIT).unwrap();
    assert!(
        !missing.status.success() && missing.stderr.contains("/no/such/file"),
        "{missing:?}"
    );
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}

#[test]
fn top_prints_one_look_and_refuses_to_draw_without_a_terminal() {
    let mut ferry = dirtier::start(2);
    let socket = ferry.api_socket().display().to_string();
    let top = |options: &[&str]| {
        let arguments = [&["top", "--api-socket", &socket][..], options].concat();
        ferry::invoke(&arguments, LIMIT).unwrap()
    };
    let seen = top(&["--once", "--interval-ms", "200"]);
    assert!(seen.status.success(), "{seen:?}");
    assert!(
        seen.stdout.contains("Running, 2 vCPUs, 128 MiB"),
        "{seen:?}"
    );
    let vcpu = seen
        .stdout
        .lines()
        .find_map(|line| line.trim().strip_prefix("vcpu "));
    let rate: u64 = vcpu
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(rate > 0, "{seen:?}");
    assert!(!seen.stdout.contains('\u{1b}'), "{seen:?}");
    let refused = top(&[]);
    assert!(
        !refused.status.success() && refused.stderr.contains("--once"),
        "{refused:?}"
    );
    audit(&mut ferry);
    let gone = top(&["--once"]);
    assert!(
        !gone.status.success() && gone.stderr.contains(&socket),
        "{gone:?}"
    );
}
