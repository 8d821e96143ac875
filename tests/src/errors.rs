//! Prints an error with its causes on one line.

use std::error::Error;

/// Returns the messages of an error and of its causes, outermost first.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Missing;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Missing);

    #[test]
    fn causes_follow_their_effects() {
        let inner = Missing {
            what: "a thing".into(),
            path: "/x".into(),
            remedy: "make it".into(),
        };
        assert_eq!(
            chain(&Outer(inner)),
            "outer: a thing is missing: /x; make it"
        );
    }
}
