//! Tests of the router: every call is described, and any request gets an answer.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::http::KeepAlive;
use super::*;
use crate::events::Events;

const OPENAPI: &str = include_str!("../../../openapi.yaml");

/// Returns method and path of the calls in `openapi.yaml`. Paths are the lines with an indent of two below `paths:`,
/// and methods those with an indent of four.
fn described() -> BTreeSet<(String, String)> {
    let mut calls = BTreeSet::new();
    let mut path = String::new();
    let lines = OPENAPI.lines().skip_while(|line| *line != "paths:").skip(1);
    for line in lines.take_while(|line| line.is_empty() || line.starts_with(' ')) {
        let Some(key) = line.trim_start().strip_suffix(':') else {
            continue;
        };
        match line.len() - line.trim_start().len() {
            2 => path = key.to_owned(),
            4 if ["get", "put", "post", "delete", "patch"].contains(&key) => {
                calls.insert((key.to_uppercase(), path.clone()));
            }
            _ => {}
        }
    }
    calls
}

#[test]
fn the_description_has_the_calls_that_there_are() {
    let there: BTreeSet<_> = ROUTES
        .iter()
        .map(|(method, path, _)| {
            let path = path.strip_prefix("/api/v1").unwrap_or(path);
            (method.name().to_owned(), path.to_owned())
        })
        .collect();
    assert_eq!(there.len(), ROUTES.len());
    assert_eq!(described(), there);
}

fn request(method: &str, path: &str, body: &[u8]) -> Request {
    Request {
        method: method.to_owned(),
        path: path.to_owned(),
        body: body.to_vec(),
        keep_alive: KeepAlive::No,
        descriptors: Vec::new(),
    }
}

#[test]
fn descriptors_come_with_the_call_that_takes_them_and_with_no_other() {
    let monitor = empty_monitor();
    let with = |path, body: &[u8]| {
        let mut request = request("PUT", path, body);
        request.descriptors = vec![std::fs::File::open("/dev/null").unwrap().into()];
        answer(&monitor, &mut request)
    };
    let response = with("/api/v1/vm.pause", b"");
    assert_eq!(response.status, 400);
    assert!(
        response.body.contains("no descriptors"),
        "{}",
        response.body
    );
    // The call is refused for another reason: the monitor has no launcher.
    let response = with("/api/v1/vm.create", br#"{"payload":{"kernel":"/k"}}"#);
    assert_eq!(response.status, 409, "{}", response.body);
}

fn empty_monitor() -> Arc<Monitor> {
    Monitor::new(None, Events::nowhere())
}

#[test]
fn what_is_not_there_is_told_apart() {
    let monitor = empty_monitor();
    for (method, path, status, named) in [
        ("PUT", "/api/v1/vm.resize-disk", 501, "vm.resize-disk"),
        ("PUT", "/api/v1/vm.levitate", 404, "vm.levitate"),
        ("PUT", "/api/v1/vm.info", 405, "GET"),
        ("GET", "/api/v1/vm.boot", 405, "PUT"),
        ("GET", "/api/v1/vm.info", 404, "no guest"),
        ("PUT", "/api/v1/vm.boot", 404, "no guest"),
        ("PUT", "/api/v1/vm.delete", 204, ""),
        ("GET", "/", 404, "/metrics"),
    ] {
        let response = answer(&monitor, &mut request(method, path, b""));
        assert_eq!(response.status, status, "{method} {path}");
        assert!(
            response.body.contains(named),
            "{method} {path}: {}",
            response.body
        );
    }
}

/// Generates JSON that resembles the bodies of calls: field names that the calls know, and values of every kind.
fn json_like() -> impl Strategy<Value = serde_json::Value> {
    let name = prop::sample::select(vec![
        "cpus",
        "boot_vcpus",
        "max_vcpus",
        "memory",
        "size",
        "shared",
        "hugepages",
        "payload",
        "kernel",
        "cmdline",
        "initramfs",
        "serial",
        "mode",
        "file",
        "interval_ms",
        "destination_url",
        "downtime_ms",
        "timeout_s",
        "timeout_strategy",
        "throttle_max",
        "verify",
        "action",
        "desired_balloon",
        "other",
    ]);
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        any::<u64>().prop_map(serde_json::Value::from),
        any::<f64>().prop_map(serde_json::Value::from),
        prop::sample::select(vec![
            "", "Null", "Tty", "resume", "Cancel", "/k", "unix:/x", "\u{0}"
        ])
        .prop_map(serde_json::Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            prop::collection::hash_map(name.clone().prop_map(String::from), inner, 0..6)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Calls that read a body. On a monitor without a guest and a launcher, none of them has an effect.
const BODIES: [&str; 5] = [
    "vm.create",
    "vm.dirty-rate",
    "vm.send-migration",
    "vm.migration-resolve",
    "vm.resize",
];

/// Checks that `call` is refused with one message in an array, whatever its body.
fn assert_refused(call: &str, body: &[u8]) {
    let response = answer(
        &empty_monitor(),
        &mut request("PUT", &format!("{PREFIX}{call}"), body),
    );
    assert!(
        [400, 404, 409].contains(&response.status),
        "{call}: {}",
        response.status
    );
    let messages: Vec<String> = serde_json::from_str(&response.body).unwrap();
    assert!(
        messages.len() == 1 && !messages[0].is_empty(),
        "{messages:?}"
    );
}

proptest! {
    #[test]
    fn any_body_is_answered(body in prop::collection::vec(any::<u8>(), 0..64), call in 0..5_usize) {
        assert_refused(BODIES[call], &body);
    }

    #[test]
    fn any_json_is_answered(body in json_like(), call in 0..5_usize) {
        assert_refused(BODIES[call], body.to_string().as_bytes());
    }

    #[test]
    fn a_configuration_is_read_from_what_it_is_written_as(
        (cpus, size) in (any::<u32>(), any::<u64>()),
        flags in any::<[bool; 2]>(),
        text in any::<Option<String>>(),
        mode in prop::sample::select(vec!["Null", "Tty", "File"]),
    ) {
        let input = serde_json::json!({
            "cpus": { "boot_vcpus": cpus, "max_vcpus": cpus },
            "memory": { "size": size, "shared": flags[0], "hugepages": flags[1] },
            "payload": { "kernel": text, "cmdline": text },
            "serial": { "mode": mode, "file": text },
        });
        let config: VmConfig = from_json(input.to_string().as_bytes()).unwrap();
        prop_assert_eq!((config.cpus.boot_vcpus, config.memory.size), (cpus, size));
        prop_assert_eq!(config.payload.cmdline.as_ref(), text.as_ref());
        let written = serde_json::to_vec(&config).unwrap();
        prop_assert_eq!(from_json::<VmConfig>(&written).unwrap(), config);
    }
}

#[test]
fn deep_nesting_is_refused_and_not_followed() {
    let deep = [b"{\"payload\":".repeat(100_000), b"[".repeat(100_000)].concat();
    for call in BODIES {
        assert_refused(call, &deep);
    }
}
