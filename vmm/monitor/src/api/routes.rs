//! Router of the API: the path and method of every call, and its implementation.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::http::{Method, Response};
use super::request::Request;
use crate::config::{ConfigError, VmConfig, from_json};
use crate::machine::MachineError;
use crate::metrics;
use crate::migrate::EndpointError;
use crate::monitor::{
    DirtyRateData, DirtyRateError, Monitor, MonitorError, Refusal, ResizeData, Resolution,
    SendMigrationData,
};

/// Prefix of the paths of all calls but `/metrics`.
const PREFIX: &str = "/api/v1/";

/// Implementation of a call.
type Handler = fn(&Monitor, &mut Request) -> Response;

/// Path of the only call that accepts descriptors, passed with SCM_RIGHTS: the taps of the network interfaces.
const TAKES_DESCRIPTORS: &str = "/api/v1/vm.create";

/// Every call: its method, its path and its implementation. A test compares the list with `openapi.yaml`.
const ROUTES: [(Method, &str, Handler); 19] = [
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
        with_body(request, |data: ResizeData| done(monitor.resize(&data)))
    }),
    (Method::Get, "/api/v1/vm.info", |monitor, _| {
        value(monitor.info())
    }),
    (Method::Get, "/api/v1/vm.counters", |monitor, _| {
        value(monitor.counters().map(|counters| counters.by_component()))
    }),
    (Method::Put, "/api/v1/vm.dirty-rate", |monitor, request| {
        let measure = |data: DirtyRateData| value(monitor.dirty_rate(&data));
        // All fields have defaults, so that the body may be empty.
        match request.body.is_empty() {
            true => measure(DirtyRateData::default()),
            false => with_body(request, measure),
        }
    }),
    (
        Method::Put,
        "/api/v1/vm.send-migration",
        |monitor, request| {
            with_body(request, |data: SendMigrationData| {
                value(monitor.send_migration(&data))
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

/// Calls of the Cloud Hypervisor API that Ferry does not implement.
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

/// Body of `vm.migration-resolve`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object")]
struct ResolveData {
    action: Resolution,
}

/// Answers one request.
pub(super) fn answer(monitor: &Arc<Monitor>, request: &mut Request) -> Response {
    let path = request.path.as_str();
    if path != TAKES_DESCRIPTORS && !request.descriptors.is_empty() {
        return Response::error(
            400,
            format!("{path}: no descriptors can be passed with this call"),
        );
    }
    if let Some((method, _, answer)) = ROUTES.iter().find(|(_, known, _)| *known == path) {
        return match request.method == method.name() {
            true => answer(monitor, request),
            false => Response::allow(
                *method,
                format!(
                    "{path}: the method of this call is not {}, but {}",
                    request.method,
                    method.name()
                ),
            ),
        };
    }
    match path.strip_prefix(PREFIX) {
        Some(call) if NOT_IMPLEMENTED.contains(&call) => {
            Response::error(501, format!("{call}: Ferry does not implement this call"))
        }
        Some(call) => Response::error(404, format!("{call}: there is no such call")),
        None => Response::error(
            404,
            format!("{path}: every call but /metrics is below {PREFIX}"),
        ),
    }
}

/// Returns the answer to `vmm.ping`.
fn ping() -> serde_json::Value {
    serde_json::json!({
        "build_version": format!("ferry {}", env!("CARGO_PKG_VERSION")),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "features": ["kvm"],
    })
}

/// Parses the body of `request` and passes it to `act`. Returns an error response if the body is missing or invalid.
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

/// Returns a response with `value` as JSON.
fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => Response::json(200, body),
        Err(error) => Response::error(500, error),
    }
}

/// Returns the response to a call that returns a value.
fn value<T: Serialize>(result: Result<T, MonitorError>) -> Response {
    result.map_or_else(|error| failed(&error), |value| json(&value))
}

/// Returns the response to a call that returns nothing.
fn done(result: Result<(), MonitorError>) -> Response {
    result.map_or_else(|error| failed(&error), |()| Response::empty())
}

/// Returns the response to a call that failed.
fn failed(error: &MonitorError) -> Response {
    Response::error(status(error), error)
}

/// Returns the HTTP status of an error, as in the Cloud Hypervisor API: 404 if there is no guest, and 405 if the state
/// of the guest does not allow the call.
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
            refusal: Refusal::Exists | Refusal::Migrating | Refusal::NoMigration | Refusal::Closing,
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
mod tests;
