//! What was built how, and where it runs: a ratio is of one build on one machine.

use std::fs;

const MANIFEST: &str = include_str!("../../../Cargo.toml");
const LOCK: &str = include_str!("../../../Cargo.lock");

const PEERS: [&str; 6] = [
    "x86_64",
    "page_table_multiarch",
    "page-table-generic",
    "aarch64-paging",
    "vm-memory",
    "roaring",
];

pub(crate) fn summary(rounds: u32) -> String {
    format!(
        "profile: {}\nprocessor: {}\npeers: {}\nrounds: {rounds}, in turns\n",
        build(),
        processor(),
        peers().join(", ")
    )
}

/// The bench profile is the release profile, which the workspace's manifest sets.
pub(crate) fn build() -> String {
    if cfg!(debug_assertions) {
        return "with debug assertions: no measurement".to_owned();
    }
    let release = MANIFEST
        .lines()
        .skip_while(|line| *line != "[profile.release]");
    let settings = release.skip(1).take_while(|line| !line.is_empty());
    format!("release, {}", settings.collect::<Vec<_>>().join(", "))
}

pub(crate) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    model.unwrap_or_else(|| "unknown".to_owned())
}

/// With the versions that were built.
pub(crate) fn peers() -> Vec<String> {
    PEERS
        .map(|name| format!("{name} {}", version(name)))
        .to_vec()
}

fn version(name: &str) -> &'static str {
    let mut lines = LOCK.lines();
    let name = format!("name = \"{name}\"");
    _ = lines.find(|line| *line == name);
    let version = lines.next().and_then(|line| line.split('"').nth(1));
    version.unwrap_or("?")
}
