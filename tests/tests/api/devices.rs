//! API calls about devices: resizing the balloon, and passing tap devices as descriptors.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use ferry_tests::dirtier::{LIMIT, PATIENT};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use ferry_tests::{api, tap};
use serde_json::{Value, json};

use super::{READY, call, config, get, put};

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
        // The guest has no balloon driver, so it keeps all of its memory.
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
fn a_balloon_is_as_large_where_its_guest_came_as_where_it_was() {
    const MIB: u64 = 1 << 20;
    let mut config = config(1);
    config["balloon"] = json!({ "size": 4 * MIB });
    let source = Ferry::empty(&[]).unwrap();
    let mark = source.serial().mark();
    put(&source, "vm.create", &config.to_string());
    put(&source, "vm.boot", "");
    source.serial().wait_after(mark, READY, LIMIT).unwrap();
    let wish = json!({ "desired_balloon": 16 * MIB }).to_string();
    put(&source, "vm.resize", &wish);
    let endpoint = Endpoint::free_tcp().unwrap();
    let destination = Ferry::receive_with(&endpoint, &["--balloon", "size=8M"]).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    assert_eq!(
        get(&destination, "vm.info")["config"]["balloon"]["size"],
        16 * MIB
    );
    put(
        &destination,
        "vm.resize",
        &json!({ "desired_balloon": 0 }).to_string(),
    );
    assert_eq!(get(&destination, "vm.info")["config"]["balloon"]["size"], 0);
}
