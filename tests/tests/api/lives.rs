//! Life cycle of a guest by API calls: creation, boot, shutdown and migration.

use std::fs;

use ferry_tests::dirtier;
use ferry_tests::dirtier::{LIMIT, PATIENT, assert_ends, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use serde_json::json;

use super::{READY, booted, call, config, get, kernel, put};

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
    // The guest was created by another monitor, so this one can shut it down but not boot it again.
    dirtier::assert_runs(&mut destination);
    put(&destination, "vm.shutdown", "");
    let answer = call(&destination, "PUT", "vm.boot", "");
    assert_eq!(answer.status, 409, "{answer:?}");
    put(&destination, "vm.delete", "");
    put(&destination, "vmm.shutdown", "");
    assert_ends(&mut destination);
}
