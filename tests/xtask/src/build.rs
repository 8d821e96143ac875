//! Static checks, documentation, and everything that the test steps run.

use std::fs;

use crate::places::Places;
use crate::session::{Done, Session};
use crate::step::Step;

/// Test programs of `ferry-tests` that only run in the lab. Cargo.toml excludes them from the default targets, so they
/// are built by name.
pub(crate) const LAB_ONLY: [&str; 6] = [
    "linux-guest",
    "linux-life",
    "linux-devices",
    "linux-limits",
    "linux-debian",
    "vhost-user",
];

/// Cargo's `--test` options for [`LAB_ONLY`].
pub(crate) fn lab_only_options() -> Vec<String> {
    LAB_ONLY.map(|name| format!("--test={name}")).to_vec()
}

/// Formatting and lints. All of them run even if one fails.
pub(crate) fn checks(session: &Session) {
    let places = &session.places;
    let format = "fmt --check --all";
    let _ = Step::new("format", 60, places.cargo(format)).run(session);
    for (package, manifest) in [
        ("ept", "ept/fuzz/Cargo.toml"),
        ("devices", "devices/fuzz/Cargo.toml"),
        ("vmm", "vmm/monitor/fuzz/Cargo.toml"),
    ] {
        let format = places.cargo(&format!("fmt --check --manifest-path {manifest}"));
        let _ = Step::new(format!("format-fuzz-{package}"), 60, format).run(session);
    }
    let clippy = "clippy --workspace --all-targets --locked -- -D warnings";
    let _ = Step::new("clippy", 900, places.cargo(clippy)).run(session);
    let mut clippy = places.cargo("clippy --workspace --locked");
    clippy
        .args(lab_only_options())
        .args(["--", "-D", "warnings"]);
    let _ = Step::new("clippy-lab", 300, clippy).run(session);
}

/// The documentation of all packages, without a broken link.
pub(crate) fn documentation(session: &Session) {
    let mut doc = session.places.cargo("doc --workspace --no-deps --locked");
    doc.env("RUSTDOCFLAGS", "-D warnings");
    let _ = Step::new("documentation", 600, doc).run(session);
}

/// Builds ept for bare metal and links it with nothing else. Only the functions that every compiler expects from its
/// environment may stay undefined.
pub(crate) fn bare_metal(session: &Session) -> Done {
    let places = &session.places;
    let target = places.target.join("bare-metal");
    let mut build = places.cargo(
        "rustc -p ferry-ept --example bare_metal --crate-type staticlib --no-default-features \
         --release --locked --config profile.release.panic=\"abort\"",
    );
    build.arg("--target-dir").arg(&target);
    Step::new("bare-metal-build", 600, build).run(session)?;

    let folder = target.join("release/examples");
    let files = fs::read_dir(&folder).into_iter().flatten().flatten();
    let mut libraries = files.filter(|file| {
        let name = file.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libbare_metal") && name.ends_with(".a")
    });
    let Some(library) = libraries.next() else {
        let what = format!("bare-metal-link: no library in {}", folder.display());
        return Err(session.trouble(what));
    };
    let mut link = places.command("ld");
    link.args(["--gc-sections", "--entry=ferry_bare_metal"])
        .args(["memcpy", "memset", "memmove", "memcmp"].map(|name| format!("--defsym={name}=0")))
        .arg("-o")
        .arg(places.cache.join("bare-metal"))
        .arg(library.path());
    Step::new("bare-metal-link", 60, link)
        .run(session)
        .map(drop)
}

/// The program `ferry` as users build it.
pub(crate) fn ferry(session: &Session) -> Done {
    let build = "build --release --locked -p ferry --bin ferry";
    let build = session.places.cargo(build);
    Step::new("build-ferry", 900, build).run(session).map(drop)
}

/// All test programs, the programs of the packages that have tests (among them the tools of `ferry-tests`), and the
/// guest programs. Every step names the whole workspace: cargo would otherwise choose other features for the
/// dependencies, and build them again.
pub(crate) fn tests(session: &Session) -> Done {
    let places = &session.places;
    let build = places.cargo("nextest run --workspace --locked --no-run");
    Step::new("build-tests", 900, build).run(session)?;
    let mut write = places.tool("write-images");
    write.arg(places.guests());
    Step::new("write-guests", 60, write).run(session).map(drop)
}

/// Programs of `ferry-tests` that run inside guests, which have no shared libraries.
pub(crate) fn static_tools(session: &Session) -> Done {
    for name in ["vsock-echo", "device-load"] {
        let build = session.places.cargo(&format!(
            "rustc --locked -p ferry-tests --bin {name} -- -C target-feature=+crt-static"
        ));
        Step::new(format!("build-static-{name}"), 300, build).run(session)?;
        keep_static(&session.places, name).map_err(|error| {
            session.trouble(format!(
                "{name} cannot be copied to the static tools: {error}"
            ))
        })?;
    }
    Ok(())
}

fn keep_static(places: &Places, name: &str) -> std::io::Result<()> {
    let folder = places.cache.join("static-tools");
    fs::create_dir_all(&folder)?;
    fs::copy(places.target.join("debug").join(name), folder.join(name)).map(drop)
}
