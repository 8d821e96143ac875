//! The one state of a guest. It owns what the guest has in that state, and nothing else says whether the guest runs.
//!
//! ```text
//! Empty ─create→ Created ─boot→ Running ⇄ Paused ─shutdown→ Off ─boot→ …
//!                               Running, Paused ─send→ Sending ─┬ failed, cancelled → Running or Paused, as before
//!                                                               ├ DONE → Vacated
//!                                                               └ in doubt → Unconfirmed ─resolve→ as before, or Vacated
//!                               Running ─guest ends by itself→ Ended
//! Empty ─a source connects→ Arriving ─┬ COMMIT → Running or Paused
//!                                     └ failed → Empty
//! ```

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::launch::LaunchPlan;
use crate::config::VmConfig;
use crate::machine::{Gauges, Live, Machine, Paused, RunState, Running};
use migration::{Attempt, Phase};

/// The states of a guest, as the Cloud Hypervisor API names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// The guest was created and has not been booted yet.
    Created,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped.
    Paused,
    /// The guest is off.
    Shutdown,
}

/// The state of a monitor and its guest, without what the state owns. The table of allowed calls is indexed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateKind {
    /// The monitor has had no guest yet.
    Empty,
    /// The guest was deleted, or runs at the destination of a migration.
    Vacated,
    /// A guest is being received.
    Arriving,
    /// The guest is configured and has not been booted yet.
    Created,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest has ended by itself, and its machine has not been released yet.
    Ended,
    /// The guest was switched off.
    Off,
    /// The guest is being sent.
    Sending,
    /// The guest was handed over, and the destination's confirmation was lost. The copy here is paused.
    Unconfirmed,
    /// The monitor is ending, and has no guest.
    Closed,
}

impl StateKind {
    /// All states.
    pub const ALL: [Self; 11] = [
        Self::Empty,
        Self::Vacated,
        Self::Arriving,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ended,
        Self::Off,
        Self::Sending,
        Self::Unconfirmed,
        Self::Closed,
    ];
}

/// The state of a monitor.
pub(super) enum State {
    /// There has been no guest yet.
    Empty,
    /// The guest was deleted, or runs elsewhere.
    Vacated,
    /// A guest is being received by a worker, which owns all that has arrived.
    Arriving,
    /// The monitor is ending, and has no guest.
    Closed,
    /// A guest is defined: created, received, or switched off.
    Guest(Box<Guest>),
}

/// A guest: its definition, which outlives its machines, and its stage.
pub(super) struct Guest {
    pub(super) config: VmConfig,
    /// Taps that the configuration names by descriptor number. They stay open as long as the guest can be booted.
    pub(super) _taps: Vec<OwnedFd>,
    /// How to make a machine for the guest. `None` for a guest that arrived by migration.
    pub(super) plan: Option<LaunchPlan>,
    pub(super) stage: Stage,
}

/// What a guest has now.
pub(super) enum Stage {
    Created,
    Running(Running),
    Paused(Paused),
    Ended(Live),
    /// Also the stage during a change: if the change panics, the machine is gone, and the guest is off indeed.
    Off,
    Sending(Sending),
    Unconfirmed(Unconfirmed),
}

/// A guest that is being sent. The worker owns the machine.
pub(super) struct Sending {
    pub(super) attempt: Attempt,
    pub(super) before: RunState,
    pub(super) gauges: Gauges,
}

/// A guest that was handed over without a confirmation.
pub(super) struct Unconfirmed {
    pub(super) machine: Paused,
    pub(super) attempt: Attempt,
    pub(super) before: RunState,
}

impl State {
    /// Returns which state this is.
    pub(super) fn kind(&self) -> StateKind {
        match self {
            Self::Empty => StateKind::Empty,
            Self::Vacated => StateKind::Vacated,
            Self::Arriving => StateKind::Arriving,
            Self::Closed => StateKind::Closed,
            Self::Guest(guest) => guest.stage.kind(),
        }
    }

    /// Returns the guest, if there is one.
    pub(super) fn guest(&self) -> Option<&Guest> {
        match self {
            Self::Guest(guest) => Some(guest),
            Self::Empty | Self::Vacated | Self::Arriving | Self::Closed => None,
        }
    }

    /// As [`Self::guest`], to change it.
    pub(super) fn guest_mut(&mut self) -> Option<&mut Guest> {
        match self {
            Self::Guest(guest) => Some(guest),
            Self::Empty | Self::Vacated | Self::Arriving | Self::Closed => None,
        }
    }

    /// Gives the guest of a worker its stage back. The machine is released if there is no such guest any more.
    pub(super) fn return_machine(&mut self, stage: Stage) {
        if let Some(guest) = self.guest_mut()
            && matches!(guest.stage, Stage::Sending(_))
        {
            guest.stage = stage;
        }
    }

    /// Moves a guest that has ended by itself to [`Stage::Ended`]. A vCPU thread records the end without a lock, so
    /// this is done each time that the state is looked at.
    pub(super) fn notice_end(&mut self) {
        let Some(guest) = self.guest_mut() else {
            return;
        };
        if guest
            .machine()
            .is_none_or(|machine| machine.end().is_none())
        {
            return;
        }
        guest.stage = match std::mem::replace(&mut guest.stage, Stage::Off) {
            Stage::Running(machine) => Stage::Ended(Live::Running(machine)),
            Stage::Paused(machine) => Stage::Ended(Live::Paused(machine)),
            other => other,
        };
    }
}

impl Guest {
    /// Returns the machine, unless the guest has none or a worker owns it.
    pub(super) fn machine(&self) -> Option<&Machine> {
        match &self.stage {
            Stage::Running(machine) => Some(machine),
            Stage::Paused(machine) => Some(machine),
            Stage::Ended(machine) => Some(machine),
            Stage::Unconfirmed(unconfirmed) => Some(&unconfirmed.machine),
            Stage::Created | Stage::Off | Stage::Sending(_) => None,
        }
    }

    /// Returns the counters of the machine, whoever owns it.
    pub(super) fn gauges(&self) -> Option<Gauges> {
        match &self.stage {
            Stage::Sending(sending) => Some(sending.gauges.clone()),
            _ => self.machine().map(Machine::gauges),
        }
    }

    /// Takes a machine that runs or is paused out of the guest, which is off then.
    pub(super) fn take_live(&mut self) -> Option<Live> {
        match std::mem::replace(&mut self.stage, Stage::Off) {
            Stage::Running(machine) => Some(Live::Running(machine)),
            Stage::Paused(machine) => Some(Live::Paused(machine)),
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// Returns the state in the words of the API.
    pub(super) fn vm_state(&self) -> VmState {
        match &self.stage {
            Stage::Created => VmState::Created,
            Stage::Running(_) => VmState::Running,
            Stage::Paused(_) | Stage::Unconfirmed(_) => VmState::Paused,
            Stage::Ended(_) | Stage::Off => VmState::Shutdown,
            Stage::Sending(sending) => sending.vm_state(),
        }
    }
}

impl Stage {
    fn kind(&self) -> StateKind {
        match self {
            Self::Created => StateKind::Created,
            Self::Running(_) => StateKind::Running,
            Self::Paused(_) => StateKind::Paused,
            Self::Ended(_) => StateKind::Ended,
            Self::Off => StateKind::Off,
            Self::Sending(_) => StateKind::Sending,
            Self::Unconfirmed(_) => StateKind::Unconfirmed,
        }
    }
}

impl From<Live> for Stage {
    fn from(machine: Live) -> Self {
        match machine {
            Live::Running(machine) => Self::Running(machine),
            Live::Paused(machine) => Self::Paused(machine),
        }
    }
}

impl Sending {
    /// The engine pauses the guest for the switchover. Before that, and after a failure, the guest is as it was.
    fn vm_state(&self) -> VmState {
        let is_paused_by_engine = matches!(
            self.attempt.report().phase,
            Phase::Switchover | Phase::Committed | Phase::Completed | Phase::HandedOverUnconfirmed
        );
        match self.before {
            RunState::Running if !is_paused_by_engine => VmState::Running,
            RunState::Running | RunState::Paused => VmState::Paused,
        }
    }
}
