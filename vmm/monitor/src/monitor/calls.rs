//! The calls to a monitor, and the table that says in which state each of them is allowed.

use super::state::StateKind;

/// A call to a monitor. Calls that never depend on the state, such as a ping or the metrics, are not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `vm.create`
    Create,
    /// `vm.boot`
    Boot,
    /// `vm.shutdown`
    ShutDown,
    /// `vm.delete`
    Delete,
    /// `vm.reboot`
    Reboot,
    /// `vm.pause`
    Pause,
    /// `vm.resume`
    Resume,
    /// `vm.power-button`
    PowerButton,
    /// `vm.resize`
    Resize,
    /// `vm.info`
    Info,
    /// `vm.counters`
    Counters,
    /// `vm.dirty-rate`
    DirtyRate,
    /// `vm.send-migration`
    SendMigration,
    /// `vm.cancel-migration`
    CancelMigration,
    /// `vm.migration-resolve`
    ResolveMigration,
    /// Begins to receive a guest. Not a call of the API: a source connects.
    Receive,
    /// `vmm.shutdown`
    ShutDownMonitor,
}

impl Call {
    /// All calls.
    pub const ALL: [Self; 17] = [
        Self::Create,
        Self::Boot,
        Self::ShutDown,
        Self::Delete,
        Self::Reboot,
        Self::Pause,
        Self::Resume,
        Self::PowerButton,
        Self::Resize,
        Self::Info,
        Self::Counters,
        Self::DirtyRate,
        Self::SendMigration,
        Self::CancelMigration,
        Self::ResolveMigration,
        Self::Receive,
        Self::ShutDownMonitor,
    ];

    /// Returns the name of the call in messages, which is that of the verb of `ferry ctl`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Boot => "boot",
            Self::ShutDown => "shutdown",
            Self::Delete => "delete",
            Self::Reboot => "reboot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::PowerButton => "power-button",
            Self::Resize => "resize",
            Self::Info => "info",
            Self::Counters => "counters",
            Self::DirtyRate => "dirty-rate",
            Self::SendMigration => "send-migration",
            Self::CancelMigration => "cancel-migration",
            Self::ResolveMigration => "migration-resolve",
            Self::Receive => "receive",
            Self::ShutDownMonitor => "shutdown-vmm",
        }
    }
}

/// Reasons why a call is refused in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no guest.
    NoGuest,
    /// There is a guest already.
    Exists,
    /// The guest has no machine.
    NotBooted,
    /// The guest has a machine already.
    Booted,
    /// The guest has ended by itself.
    Ended,
    /// A migration is in progress, or was not confirmed.
    Migrating,
    /// There is no migration that the call could act on.
    NoMigration,
    /// The monitor is ending.
    Closing,
}

/// Returns why `call` is refused in `state`, or `None` if it is allowed. This is the only place that decides so.
#[must_use]
pub fn refusal(call: Call, state: StateKind) -> Option<Refusal> {
    use Call::{
        Boot, CancelMigration, Counters, Create, Delete, DirtyRate, Info, Pause, PowerButton,
        Reboot, Receive, Resize, ResolveMigration, Resume, SendMigration, ShutDown,
        ShutDownMonitor,
    };
    use StateKind::{
        Arriving, Closed, Created, Empty, Ended, Off, Paused, Running, Sending, Unconfirmed,
        Vacated,
    };
    match (state, call) {
        (Sending | Arriving, CancelMigration) => None,
        (Unconfirmed, ResolveMigration) => None,
        (_, CancelMigration | ResolveMigration) => Some(Refusal::NoMigration),

        (Closed, ShutDownMonitor) => None,
        (Closed, _) => Some(Refusal::Closing),

        (Empty | Vacated, Create | Delete | Receive | ShutDownMonitor) => None,
        (Empty | Vacated, _) => Some(Refusal::NoGuest),

        (Arriving, Info | Counters) => Some(Refusal::NoGuest),
        (Sending | Unconfirmed, Info | Counters) => None,
        (Arriving | Sending | Unconfirmed, _) => Some(Refusal::Migrating),

        (_, Create | Receive) => Some(Refusal::Exists),
        (_, Info | Delete | ShutDownMonitor) => None,

        (Created | Off, Boot) => None,
        (Created | Off, _) => Some(Refusal::NotBooted),

        (_, Counters | ShutDown | Reboot) => None,
        (Ended, _) => Some(Refusal::Ended),
        (Running | Paused, Boot) => Some(Refusal::Booted),
        (Running | Paused, Pause | Resume | PowerButton | Resize | DirtyRate | SendMigration) => {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as people read it: one line a call, one column a state. `.` is allowed; a letter is the refusal:
    /// g no guest, x exists, n not booted, b booted, e ended, m migrating, o no migration, c closing.
    const TABLE: &str = "
                          Empty Vacated Arriving Created Running Paused Ended Off Sending Unconfirmed Closed
        create            .     .       m        x       x       x      x     x   m       m           c
        boot              g     g       m        .       b       b      e     .   m       m           c
        shutdown          g     g       m        n       .       .      .     n   m       m           c
        delete            .     .       m        .       .       .      .     .   m       m           c
        reboot            g     g       m        n       .       .      .     n   m       m           c
        pause             g     g       m        n       .       .      e     n   m       m           c
        resume            g     g       m        n       .       .      e     n   m       m           c
        power-button      g     g       m        n       .       .      e     n   m       m           c
        resize            g     g       m        n       .       .      e     n   m       m           c
        info              g     g       g        .       .       .      .     .   .       .           c
        counters          g     g       g        n       .       .      .     n   .       .           c
        dirty-rate        g     g       m        n       .       .      e     n   m       m           c
        send-migration    g     g       m        n       .       .      e     n   m       m           c
        cancel-migration  o     o       .        o       o       o      o     o   .       o           o
        migration-resolve o     o       o        o       o       o      o     o   o       .           o
        receive           .     .       m        x       x       x      x     x   m       m           c
        shutdown-vmm      .     .       m        .       .       .      .     .   m       m           .
    ";

    fn letter(refusal: Option<Refusal>) -> &'static str {
        match refusal {
            None => ".",
            Some(Refusal::NoGuest) => "g",
            Some(Refusal::Exists) => "x",
            Some(Refusal::NotBooted) => "n",
            Some(Refusal::Booted) => "b",
            Some(Refusal::Ended) => "e",
            Some(Refusal::Migrating) => "m",
            Some(Refusal::NoMigration) => "o",
            Some(Refusal::Closing) => "c",
        }
    }

    #[test]
    fn the_table_is_the_one_that_people_read() {
        let mut lines = TABLE.lines().map(str::trim).filter(|line| !line.is_empty());
        let states: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
        let kinds: Vec<String> = StateKind::ALL.map(|kind| format!("{kind:?}")).to_vec();
        assert_eq!(states, kinds);
        let rows: Vec<Vec<&str>> = lines
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows.len(), Call::ALL.len());
        for (row, call) in rows.iter().zip(Call::ALL) {
            assert_eq!(row[0], call.name());
            let letters = StateKind::ALL.map(|state| letter(refusal(call, state)));
            assert_eq!(row[1..], letters, "{}", call.name());
        }
    }
}
