//! All attacks, grouped by the part of the specification that they violate.

mod balloon;
mod block;
mod chains;
mod handshake;
mod live;
mod net;
mod registers;
mod rings;
mod streams;
mod tables;
mod vsock;

use crate::attack::Attack;

/// All attacks in their order.
pub(crate) const ALL: [&[Attack]; 11] = [
    &chains::ATTACKS,
    &tables::ATTACKS,
    &rings::ATTACKS,
    &handshake::ATTACKS,
    &live::ATTACKS,
    &registers::ATTACKS,
    &block::ATTACKS,
    &net::ATTACKS,
    &vsock::ATTACKS,
    &balloon::ATTACKS,
    &streams::ATTACKS,
];
