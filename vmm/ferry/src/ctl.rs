//! `ferry ctl`: one call to a running monitor.

use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use serde_json::{Value, json};

use super::arguments::{Call, CtlArguments, ResolveArgument, SendArguments};
use super::report::{send_and_watch, table};
use super::{Failure, say};
use vmm::api::{Method, USUAL_LIMIT, call, metrics};
use vmm::monitor::SendMigrationData;

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
            say(metrics(socket)?.trim_end())?;
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
            // As long as it was asked to take, and as any call may take beyond that.
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

fn put(socket: &Path, name: &str, body: Option<&Value>) -> Result<u8, Failure> {
    call(socket, Method::Put, name, body, USUAL_LIMIT)?;
    Ok(0)
}

/// The JSON in a file, or in standard input.
fn read_json(file: &Path) -> Result<Value, Failure> {
    let text = match file == Path::new("-") {
        true => io::read_to_string(io::stdin()),
        false => fs::read_to_string(file),
    };
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let text = text.map_err(|error| named(&error))?;
    Ok(serde_json::from_str(&text).map_err(|error| named(&error))?)
}

fn show(answer: &Value) -> Result<u8, Failure> {
    say(&format!("{answer:#}"))?;
    Ok(0)
}

fn send(socket: &Path, arguments: &SendArguments) -> Result<u8, Failure> {
    let wish = SendMigrationData {
        destination_url: arguments.url.to_string(),
        downtime_ms: arguments.downtime_ms,
        timeout_s: arguments.timeout_s,
        timeout_strategy: arguments.timeout_strategy.into(),
        throttle_max: arguments.throttle_max,
        verify: arguments.verify,
    };
    let snapshot = send_and_watch(socket, &wish, |_| {})?;
    match arguments.json {
        true => say(&serde_json::to_string(&snapshot)?)?,
        false => say(table(&snapshot).trim_end())?,
    }
    Ok(0)
}
