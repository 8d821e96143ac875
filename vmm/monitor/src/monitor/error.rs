//! Errors of calls to a monitor.

use super::calls::{Call, Refusal};
use super::dirty_rate::DirtyRateError;
use crate::config::ConfigError;
use crate::machine::MachineError;
use crate::migrate::EndpointError;
use migration::{Phase, SendError};

/// Reasons why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The call is not allowed in the state that the guest is in.
    #[error("{}: {}", .call.name(), why(*.refusal))]
    Refused {
        /// The call.
        call: Call,
        /// Why it is not allowed.
        refusal: Refusal,
    },
    /// A migration is in the way.
    #[error("{} cannot be done while a migration is in phase {}{}", .call.name(), .phase, hint(*.phase))]
    Migrating {
        /// The call.
        call: Call,
        /// Phase of the migration.
        phase: Phase,
    },
    /// There is no migration on which the call could act.
    #[error("{}: the migration is in phase {}, there is nothing to {}", .call.name(), .phase, verb(*.call))]
    NoMigration {
        /// The call.
        call: Call,
        /// Phase of the last migration.
        phase: Phase,
    },
    /// A value is out of range.
    #[error("{0}")]
    Invalid(String),
    /// The monitor only receives guests.
    #[error(
        "create: this monitor waits for a guest that another one sends; `ferry run --api-socket PATH` makes them"
    )]
    NoLauncher,
    /// The monitor only receives guests, and has had the one that it waited for.
    #[error(
        "create: this monitor only takes a guest that another one sends, and has had it; end it with `ferry ctl \
         shutdown-vmm`, and start another with `ferry run --api-socket PATH`"
    )]
    HadGuest,
    /// The configuration of the guest is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The guest arrived by migration, so that nothing here can boot it again.
    #[error("{}: this guest cannot be started again here: it came from another monitor", .0.name())]
    NotLaunchedHere(Call),
    /// No machine could be made for the guest, which is off.
    #[error("the guest could not be started: {0}")]
    Launch(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The rate at which the guest dirties memory could not be measured.
    #[error("dirty-rate: {0}")]
    DirtyRate(#[from] DirtyRateError),
    /// The address of the other side is invalid, or cannot be reached.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The machine could not be changed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest was not handed over.
    #[error("the guest was not handed over: {0}{hint}", hint = resolve_hint(.0))]
    Send(#[from] SendError),
}

fn why(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::NoGuest => "there is no guest here",
        Refusal::Exists => "there is a guest already; delete it first",
        Refusal::NotBooted => "the guest is not booted; boot it first",
        Refusal::Booted => "the guest is booted already",
        Refusal::Ended => "the guest has ended",
        Refusal::Migrating => "a migration is in progress",
        Refusal::NoMigration => "there is no migration",
        Refusal::Closing => "the monitor is ending",
    }
}

fn verb(call: Call) -> &'static str {
    match call {
        Call::ResolveMigration => "resolve",
        _ => "cancel",
    }
}

fn hint(phase: Phase) -> &'static str {
    match phase {
        Phase::HandedOverUnconfirmed => ": say with migration-resolve where the guest is",
        Phase::Committed => "",
        _ => ": wait for it, or cancel-migration first",
    }
}

fn resolve_hint(error: &SendError) -> &'static str {
    match error {
        SendError::Unconfirmed(_) => {
            "; find out whether the guest runs there, then say so with migration-resolve; a destination that does \
             not answer may still run it: end its process before you resume the guest here"
        }
        _ => "",
    }
}
