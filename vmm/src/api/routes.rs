//! Which call does what.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::http::{Request, Response};
use crate::config::{ConfigError, from_json};
use crate::monitor::{Monitor, MonitorError, Resolution};

const PREFIX: &str = "/api/v1/";

/// Calls of the Cloud Hypervisor API that Ferry knows of and does not have.
const NOT_IMPLEMENTED: [&str; 23] = [
    "vm.create",
    "vm.boot",
    "vm.delete",
    "vm.counters",
    "vm.nmi",
    "vm.resize",
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
    "vm.snapshot",
    "vm.restore",
    "vm.coredump",
    "vm.receive-migration",
    "vmm.nmi",
];

/// The body of `vm.migration-resolve`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResolveData {
    action: Resolution,
}

/// Answers one request.
pub(super) fn answer(monitor: &Arc<Monitor>, request: &Request) -> Response {
    let Some(call) = request.path.strip_prefix(PREFIX) else {
        return Response::error(
            404,
            format!("{}: every call is below {PREFIX}", request.path),
        );
    };
    match (request.method.as_str(), call) {
        ("GET", "vmm.ping") => json(&ping()),
        ("GET", "vm.info") => monitor
            .info()
            .map_or_else(|error| failed(&error), |info| json(&info)),
        ("GET", "vm.migration-progress") => json(&monitor.migration_progress()),
        ("PUT", "vm.pause") => done(monitor.pause()),
        ("PUT", "vm.resume") => done(monitor.resume()),
        ("PUT", "vm.power-button") => done(monitor.power_button()),
        ("PUT", "vm.reboot") => done(monitor.reboot()),
        ("PUT", "vm.shutdown" | "vmm.shutdown") => done(monitor.shutdown()),
        ("PUT", "vm.send-migration") => with_body(request, |wish| {
            monitor
                .send_migration(&wish)
                .map_or_else(|error| failed(&error), |snapshot| json(&snapshot))
        }),
        ("PUT", "vm.cancel-migration") => done(monitor.cancel_migration()),
        ("PUT", "vm.migration-resolve") => with_body(request, |data: ResolveData| {
            done(monitor.resolve_migration(data.action))
        }),
        (_, call) if NOT_IMPLEMENTED.contains(&call) => {
            Response::error(501, format!("{call}: Ferry does not have this call"))
        }
        (method, call) if is_known(call) => {
            Response::error(405, format!("{call}: {method} is not how it is called"))
        }
        (_, call) => Response::error(404, format!("{call}: there is no such call")),
    }
}

fn is_known(call: &str) -> bool {
    [
        "vmm.ping",
        "vmm.shutdown",
        "vm.info",
        "vm.migration-progress",
        "vm.pause",
        "vm.resume",
        "vm.shutdown",
        "vm.power-button",
        "vm.reboot",
        "vm.send-migration",
        "vm.cancel-migration",
        "vm.migration-resolve",
    ]
    .contains(&call)
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
    from_json(&request.body).map_or_else(|error: ConfigError| Response::error(400, error), act)
}

fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => Response { status: 200, body },
        Err(error) => Response::error(500, error),
    }
}

fn done(result: Result<(), MonitorError>) -> Response {
    result.map_or_else(|error| failed(&error), |()| Response::empty())
}

fn failed(error: &MonitorError) -> Response {
    let status = match error {
        MonitorError::NoGuest => 404,
        MonitorError::Migrating { .. }
        | MonitorError::NoMigration { .. }
        | MonitorError::NoReboot => 409,
        MonitorError::Invalid(_) | MonitorError::Transport(_) => 400,
        MonitorError::Machine(_) | MonitorError::Send(_) | MonitorError::Restart(_) => 500,
    };
    Response::error(status, error)
}
