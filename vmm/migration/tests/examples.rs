//! The examples of the crate do what they say.

#[path = "../examples/embed.rs"]
mod embed;

#[test]
fn the_embedded_monitor_migrates_its_guest() {
    embed::main().unwrap();
}
