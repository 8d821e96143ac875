//! The HTTP API: third-party clients, clients that misbehave, events, metrics, and the programs `ferry ctl` and `ferry
//! top`. Runs on every KVM host.

mod clients;
mod devices;
mod doors;
mod events;
mod figures;
mod lives;

use std::os::fd::OwnedFd;

use ferry_tests::api::{self, Answer};
use ferry_tests::dirtier::LIMIT;
use ferry_tests::ferry::Ferry;
use ferry_tests::paths;
use serde_json::{Value, json};

/// Output of the dirtier when it begins to write.
const READY: &str = "dirtier: ready";
/// Upper limit for the pages that the dirtier writes: its 48 MiB, its stacks and its code.
const PAGES_MOST: u64 = 13_000;

fn kernel(name: &str) -> String {
    paths::guest(name).unwrap().display().to_string()
}

/// Returns the configuration of the dirtier, with the serial port on stdio of the monitor.
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

/// Creates and boots the dirtier by API calls, and waits until it writes.
fn booted(ferry: &Ferry, cpus: u32) {
    let mark = ferry.serial().mark();
    put(ferry, "vm.create", &config(cpus).to_string());
    put(ferry, "vm.boot", "");
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
}

/// Makes child processes inherit the descriptor.
fn inherit(descriptor: &OwnedFd) {
    rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
}

/// Returns the value of a sample in the text format of Prometheus.
fn sample(text: &str, name: &str) -> f64 {
    let found: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .collect();
    assert_eq!(found.len(), 1, "{name}: {text}");
    found[0]
}
