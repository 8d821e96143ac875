//! A script's steps: as many as there are bytes for, where a `Vec` would have one byte in two end it.

use arbitrary::{Arbitrary, Result, Unstructured};

const MOST: usize = 64;

#[derive(Debug)]
pub(crate) struct Steps<S>(pub(crate) Vec<S>);

impl<'a, S: Arbitrary<'a>> Arbitrary<'a> for Steps<S> {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> Result<Self> {
        let mut steps = Vec::new();
        while !bytes.is_empty() && steps.len() < MOST {
            steps.push(bytes.arbitrary()?);
        }
        Ok(Self(steps))
    }
}
