//! The API from outside: by a client that nobody here wrote, by curl, and by clients that misbehave; the events; and the
//! views of it, `ferry ctl` and `ferry top`. All of it holds on every host with a KVM.

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

/// Lets children of this process have the descriptor, too.
fn inherit(descriptor: &OwnedFd) {
    rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
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
