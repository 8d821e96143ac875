//! Which call does what.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::http::{Method, Request, Response};
use crate::config::{ConfigError, VmConfig, from_json};
use crate::machine::MachineError;
use crate::metrics;
use crate::migrate::EndpointError;
use crate::monitor::{
    DirtyRateData, DirtyRateError, Monitor, MonitorError, Refusal, ResizeData, Resolution,
    SendMigrationData,
};

const PREFIX: &str = "/api/v1/";

type Answer = fn(&Monitor, &mut Request) -> Response;

/// The one call that descriptors may come with, as `SCM_RIGHTS` of its bytes: the taps of its interfaces.
const TAKES_DESCRIPTORS: &str = "/api/v1/vm.create";

/// Every call: how it is made, where, and what answers it. `openapi.yaml` describes just these.
const ROUTES: [(Method, &str, Answer); 19] = [
    (Method::Get, "/api/v1/vmm.ping", |_, _| json(&ping())),
    (Method::Put, "/api/v1/vmm.shutdown", |monitor, _| {
        done(monitor.end_all())
    }),
    (Method::Put, "/api/v1/vm.create", |monitor, request| {
        let passed = std::mem::take(&mut request.descriptors);
        with_body(request, |config: VmConfig| {
            done(monitor.create(config, passed))
        })
    }),
    (Method::Put, "/api/v1/vm.boot", |monitor, _| {
        done(monitor.boot())
    }),
    (Method::Put, "/api/v1/vm.shutdown", |monitor, _| {
        done(monitor.shut_down())
    }),
    (Method::Put, "/api/v1/vm.delete", |monitor, _| {
        done(monitor.delete())
    }),
    (Method::Put, "/api/v1/vm.reboot", |monitor, _| {
        done(monitor.reboot())
    }),
    (Method::Put, "/api/v1/vm.pause", |monitor, _| {
        done(monitor.pause())
    }),
    (Method::Put, "/api/v1/vm.resume", |monitor, _| {
        done(monitor.resume())
    }),
    (Method::Put, "/api/v1/vm.power-button", |monitor, _| {
        done(monitor.power_button())
    }),
    (Method::Put, "/api/v1/vm.resize", |monitor, request| {
        with_body(request, |wish: ResizeData| done(monitor.resize(&wish)))
    }),
    (Method::Get, "/api/v1/vm.info", |monitor, _| {
        told(monitor.info())
    }),
    (Method::Get, "/api/v1/vm.counters", |monitor, _| {
        told(monitor.counters().map(|counters| counters.by_component()))
    }),
    (Method::Put, "/api/v1/vm.dirty-rate", |monitor, request| {
        let measure = |wish: DirtyRateData| told(monitor.dirty_rate(&wish));
        // All its fields have defaults.
        match request.body.is_empty() {
            true => measure(DirtyRateData::default()),
            false => with_body(request, measure),
        }
    }),
    (
        Method::Put,
        "/api/v1/vm.send-migration",
        |monitor, request| {
            with_body(request, |wish: SendMigrationData| {
                told(monitor.send_migration(&wish))
            })
        },
    ),
    (
        Method::Get,
        "/api/v1/vm.migration-progress",
        |monitor, _| json(&monitor.migration_progress()),
    ),
    (Method::Put, "/api/v1/vm.cancel-migration", |monitor, _| {
        done(monitor.cancel_migration())
    }),
    (
        Method::Put,
        "/api/v1/vm.migration-resolve",
        |monitor, request| {
            with_body(request, |data: ResolveData| {
                done(monitor.resolve_migration(data.action))
            })
        },
    ),
    (Method::Get, "/metrics", |monitor, _| {
        Response::text(metrics::CONTENT_TYPE, metrics::render(monitor))
    }),
];

/// Calls of the Cloud Hypervisor API that Ferry knows of and does not have.
const NOT_IMPLEMENTED: [&str; 19] = [
    "vm.nmi",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.add-device",
    "vm.remove-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-pmem",
    "vm.add-net",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.add-user-device",
    "vm.balloon-stats",
    "vm.snapshot",
    "vm.restore",
    "vm.coredump",
    "vm.receive-migration",
    "vmm.nmi",
];

/// The body of `vm.migration-resolve`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
struct ResolveData {
    action: Resolution,
}

/// Answers one request.
pub(super) fn answer(monitor: &Arc<Monitor>, request: &mut Request) -> Response {
    let path = request.path.as_str();
    if path != TAKES_DESCRIPTORS && !request.descriptors.is_empty() {
        return Response::error(400, format!("{path}: no descriptors come with this call"));
    }
    if let Some((method, _, answer)) = ROUTES.iter().find(|(_, known, _)| *known == path) {
        return match request.method == method.name() {
            true => answer(monitor, request),
            false => Response::allow(
                *method,
                format!(
                    "{path}: {} is not how it is called, but {}",
                    request.method,
                    method.name()
                ),
            ),
        };
    }
    match path.strip_prefix(PREFIX) {
        Some(call) if NOT_IMPLEMENTED.contains(&call) => {
            Response::error(501, format!("{call}: Ferry does not have this call"))
        }
        Some(call) => Response::error(404, format!("{call}: there is no such call")),
        None => Response::error(
            404,
            format!("{path}: every call but /metrics is below {PREFIX}"),
        ),
    }
}

fn ping() -> serde_json::Value {
    serde_json::json!({
        "build_version": format!("ferry {}", env!("CARGO_PKG_VERSION")),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "features": ["kvm"],
    })
}

fn with_body<T: serde::de::DeserializeOwned>(
    request: &Request,
    act: impl FnOnce(T) -> Response,
) -> Response {
    if request.body.is_empty() {
        return Response::error(
            400,
            format!("{}: this call needs a JSON body", request.path),
        );
    }
    from_json(&request.body).map_or_else(|error: ConfigError| Response::error(400, error), act)
}

fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => Response::json(200, body),
        Err(error) => Response::error(500, error),
    }
}

fn told<T: Serialize>(result: Result<T, MonitorError>) -> Response {
    result.map_or_else(|error| failed(&error), |value| json(&value))
}

fn done(result: Result<(), MonitorError>) -> Response {
    result.map_or_else(|error| failed(&error), |()| Response::empty())
}

fn failed(error: &MonitorError) -> Response {
    Response::error(status(error), error)
}

/// As the Cloud Hypervisor API: 404 where there is no guest, 405 where it is not in the state for the call.
fn status(error: &MonitorError) -> u16 {
    match error {
        MonitorError::Invalid(_)
        | MonitorError::Config(_)
        | MonitorError::DirtyRate(DirtyRateError::Interval(_))
        | MonitorError::Endpoint(
            EndpointError::Url(_) | EndpointError::NotLoopback(_) | EndpointError::PathTooLong(_),
        ) => 400,
        MonitorError::Refused {
            refusal: Refusal::NoGuest,
            ..
        } => 404,
        MonitorError::Refused {
            refusal: Refusal::NotBooted | Refusal::Booted | Refusal::Ended,
            ..
        }
        | MonitorError::Machine(MachineError::Ended) => 405,
        MonitorError::Refused {
            refusal: Refusal::Exists | Refusal::Migrating | Refusal::NoMigration,
            ..
        }
        | MonitorError::Migrating { .. }
        | MonitorError::NoMigration { .. }
        | MonitorError::NoLauncher
        | MonitorError::HadGuest
        | MonitorError::NotLaunchedHere(_)
        | MonitorError::DirtyRate(DirtyRateError::AtWork | DirtyRateError::Interrupted) => 409,
        MonitorError::Machine(_)
        | MonitorError::Launch(_)
        | MonitorError::DirtyRate(_)
        | MonitorError::Endpoint(EndpointError::Taken { .. } | EndpointError::Io { .. })
        | MonitorError::Send(_) => 500,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::http::KeepAlive;
    use super::*;
    use crate::events::Events;

    const OPENAPI: &str = include_str!("../../openapi.yaml");

    /// The calls that the description has: method and path. Its paths are the lines with two spaces before them below
    /// `paths:`, their methods those with four.
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
        // It is refused for another reason: there is no launcher.
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

    /// JSON that looks like what the calls take: the names that they know, and values of every kind.
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

    /// Calls that read a body. Without a guest and a launcher none of them can do anything.
    const BODIES: [&str; 5] = [
        "vm.create",
        "vm.dirty-rate",
        "vm.send-migration",
        "vm.migration-resolve",
        "vm.resize",
    ];

    /// Whatever was sent: one of the refusals, as an array of messages.
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
            let said = serde_json::json!({
                "cpus": { "boot_vcpus": cpus, "max_vcpus": cpus },
                "memory": { "size": size, "shared": flags[0], "hugepages": flags[1] },
                "payload": { "kernel": text, "cmdline": text },
                "serial": { "mode": mode, "file": text },
            });
            let config: VmConfig = from_json(said.to_string().as_bytes()).unwrap();
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
}
