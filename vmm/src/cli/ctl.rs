//! `ferry ctl`: one call to a running monitor.

use std::path::Path;

use serde_json::{Value, json};

use super::arguments::{Call, CtlArguments, ResolveArgument, SendArguments};
use super::report::{send_and_watch, table};
use super::{Failure, say};
use crate::api::{Method, USUAL_LIMIT, call};
use crate::monitor::SendMigrationData;

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
        Call::Pause => put(socket, "vm.pause", None),
        Call::Resume => put(socket, "vm.resume", None),
        Call::Shutdown => put(socket, "vm.shutdown", None),
        Call::PowerButton => put(socket, "vm.power-button", None),
        Call::Reboot => put(socket, "vm.reboot", None),
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
