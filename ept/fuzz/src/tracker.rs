//! Marks, protections and harvests of a tracker, done to sets of pages, too.
use arbitrary::Arbitrary;
/// x
#[derive(Arbitrary, Debug)]
pub struct Script {}
impl Script { /// x
 pub fn run(self) {} }
