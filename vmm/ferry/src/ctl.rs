//! `ferry ctl`: makes one API call to a running monitor.

use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use serde_json::{Value, json};

use super::arguments::{Call, CtlArguments, ResolveArgument, SendArguments};
use super::report::{send_migration, table};
use super::{Failure, print_line};
use vmm::api::{Method, USUAL_LIMIT, call, metrics};
use vmm::monitor::SendMigrationData;

/// Makes the call and prints its answer. Returns the exit status.
pub(super) fn ctl(arguments: &CtlArguments) -> Result<u8, Failure> {
    let socket = &arguments.api_socket;
    match &arguments.call {
        Call::Ping => show(&call(socket, Method::Get, "vmm.ping", None, USUAL_LIMIT)?),
        Call::Info => show(&call(socket, Method::Get, "vm.info", None, USUAL_LIMIT)?),
        Call::MigrationProgress => show(&call(
            socket,
            Method::Get,
            "vm.migration-progress",
            None,
            USUAL_LIMIT,
        )?),
        Call::Counters => show(&call(
            socket,
            Method::Get,
            "vm.counters",
            None,
            USUAL_LIMIT,
        )?),
        Call::Metrics => {
            print_line(metrics(socket)?.trim_end())?;
            Ok(0)
        }
        Call::Create { file } => put(socket, "vm.create", Some(&read_json(file)?)),
        Call::Boot => put(socket, "vm.boot", None),
        Call::Delete => put(socket, "vm.delete", None),
        Call::DirtyRate { interval_ms } => show(&call(
            socket,
            Method::Put,
            "vm.dirty-rate",
            Some(&json!({ "interval_ms": interval_ms })),
            // The monitor answers when the interval has passed.
            USUAL_LIMIT.map(|limit| limit + Duration::from_millis(*interval_ms)),
        )?),
        Call::Pause => put(socket, "vm.pause", None),
        Call::Resume => put(socket, "vm.resume", None),
        Call::Shutdown => put(socket, "vm.shutdown", None),
        Call::ShutdownVmm => put(socket, "vmm.shutdown", None),
        Call::PowerButton => put(socket, "vm.power-button", None),
        Call::Reboot => put(socket, "vm.reboot", None),
        Call::Resize { balloon } => put(
            socket,
            "vm.resize",
            Some(&json!({ "desired_balloon": balloon })),
        ),
        Call::CancelMigration => put(socket, "vm.cancel-migration", None),
        Call::MigrationResolve { action } => {
            let action = match action {
                ResolveArgument::Resume => "resume",
                ResolveArgument::Discard => "discard",
            };
            put(
                socket,
                "vm.migration-resolve",
                Some(&json!({ "action": action })),
            )
        }
        Call::SendMigration(arguments) => send(socket, arguments),
    }
}

/// Makes a PUT call whose answer has no body.
fn put(socket: &Path, name: &str, body: Option<&Value>) -> Result<u8, Failure> {
    call(socket, Method::Put, name, body, USUAL_LIMIT)?;
    Ok(0)
}

/// Reads JSON from a file, or from standard input if the path is `-`.
fn read_json(file: &Path) -> Result<Value, Failure> {
    let text = match file == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => fs::read_to_string(file),
    };
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let text = text.map_err(|error| named(&error))?;
    Ok(serde_json::from_str(&text).map_err(|error| named(&error))?)
}

/// Prints the answer of a call as indented JSON.
fn show(answer: &Value) -> Result<u8, Failure> {
    print_line(&format!("{answer:#}"))?;
    Ok(0)
}

/// Sends the guest to another process and prints the report of the migration.
fn send(socket: &Path, arguments: &SendArguments) -> Result<u8, Failure> {
    let request = SendMigrationData {
        destination_url: arguments.url.to_string(),
        downtime_ms: arguments.downtime_ms,
        timeout_s: arguments.timeout_s,
        timeout_strategy: arguments.timeout_strategy.into(),
        throttle_max: arguments.throttle_max,
        verify: arguments.verify,
    };
    let report = send_migration(socket, &request, |_| {})?;
    match arguments.json {
        true => print_line(&serde_json::to_string(&report)?)?,
        false => print_line(table(&report).trim_end())?,
    }
    Ok(0)
}
