//! What the figures say of their targets.

use crate::contest::{Role, Target};
use crate::measure::{Measured, Times};

/// Which of a contestant's figures is looked at.
#[derive(Clone, Copy)]
pub(crate) enum By {
    Median,
    Min,
}

impl By {
    pub(crate) fn of(self, times: &Times) -> f64 {
        match self {
            Self::Median => times.median,
            Self::Min => times.min,
        }
    }
}

impl Measured {
    pub(crate) fn with(&self, role: Role) -> Option<&Times> {
        self.times.iter().find(|times| times.role == role)
    }

    pub(crate) fn best_peer(&self, by: By) -> Option<&Times> {
        self.best(by, |role| role == Role::Peer)
    }

    fn best(&self, by: By, wanted: impl Fn(Role) -> bool) -> Option<&Times> {
        let wanted = self.times.iter().filter(|times| wanted(times.role));
        wanted.min_by(|one, other| by.of(one).total_cmp(&by.of(other)))
    }

    /// How many times as long as `other` Ferry takes.
    pub(crate) fn ratio(&self, other: Option<&Times>, by: By) -> Option<f64> {
        Some(by.of(self.with(Role::Ferry)?) / by.of(other?))
    }

    /// How many times as fast two threads are.
    pub(crate) fn speedup(&self, alone: Role, together: Role, by: By) -> Option<f64> {
        Some(by.of(self.with(alone)?) / by.of(self.with(together)?))
    }

    /// Whether the target is met; nothing where there is nobody to compare with.
    pub(crate) fn met(&self, by: By) -> Option<bool> {
        let plain = || self.ratio(self.with(Role::Plain), by);
        let peer = || self.ratio(self.best_peer(by), by);
        match self.target {
            Target::TimesPlain(most) => Some(plain()? <= most),
            Target::PeerOrPlain {
                peer: faster,
                plain: most,
            } => Some(1.0 / peer()? >= faster || plain()? <= most),
            Target::AtMost(most) => Some(by.of(self.with(Role::Ferry)?) <= most),
            Target::NotSlower => {
                let others = self.best(by, |role| matches!(role, Role::Plain | Role::Peer));
                Some(self.ratio(others, by)? <= 1.0)
            }
            Target::Speedup(least) => Some(self.speedup(Role::Alone, Role::Ferry, by)? >= least),
        }
    }
}
