//! Debian's kernels for the lab and for guests, and a whole Debian as a guest's disk. All are kept in the cache.

use std::path::Path;
use std::process::Command;
use std::{fs, io};

use crate::session::{Done, Failed, Session};
use crate::step::Step;

/// The kernel series that are fetched.
pub(crate) const SERIES: [&str; 2] = ["6.1", "6.12"];

/// Name of a package of a series: `linux-image-`, the series, the ABI, and this.
const SUFFIX: &str = "-cloud-amd64-unsigned";

/// Fetches the kernels, and makes the Debian. A Debian that cannot be made is reported; only one test needs it.
///
/// # Errors
/// Returns [`Failed`] if a kernel cannot be had.
pub(crate) fn all(session: &Session) -> Done {
    kernels(session)?;
    let _ = debian(session);
    Ok(())
}

/// Fetches the kernels that are not in the cache.
///
/// # Errors
/// Returns [`Failed`] if a kernel cannot be had.
pub(crate) fn kernels(session: &Session) -> Done {
    let missing = |series: &&str| !session.places.cache.join("kernels").join(series).is_dir();
    let missing: Vec<_> = SERIES.into_iter().filter(missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut update = as_root(session, "env");
    update.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "update"]);
    Step::new("apt-update", 300, update).run(session)?;
    let names = session
        .places
        .command("apt-cache")
        .args(["pkgnames", "linux-image-6"])
        .output();
    let names = names.map_err(|error| session.trouble(format!("apt-cache: {error}")))?;
    let names = String::from_utf8_lossy(&names.stdout);
    missing
        .into_iter()
        .try_for_each(|series| kernel(session, series, &names))
}

/// The package is unpacked beside its place and then renamed, so that a half-fetched kernel is never taken for one.
fn kernel(session: &Session, series: &str, names: &str) -> Done {
    let Some(package) = newest(series, names) else {
        return Err(session.trouble(format!(
            "no cloud kernel {series} in the archives of apt; is this Debian 12 with its security archive?"
        )));
    };
    let kernels = session.places.cache.join("kernels");
    let part = kernels.join(format!("{series}.part"));
    file_system(session, &part, empty_folder(&part))?;

    let mut download = session.places.command("apt-get");
    download.args(["download", package]).current_dir(&part);
    Step::new(format!("download-{series}"), 600, download).run(session)?;
    let files = fs::read_dir(&part).into_iter().flatten().flatten();
    let archives = files.map(|file| file.path());
    let archive = archives
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"));
    let Some(archive) = archive else {
        return Err(session.trouble(format!("apt-get download {package} left no package")));
    };
    let mut unpack = session.places.command("dpkg-deb");
    let unpacked = part.join("unpacked");
    unpack.arg("-x").arg(archive).arg(&unpacked);
    Step::new(format!("unpack-{series}"), 120, unpack).run(session)?;

    let place = kernels.join(series);
    file_system(session, &place, fs::rename(&unpacked, &place))?;
    file_system(session, &part, fs::remove_dir_all(&part))
}

/// The package of a series with the highest ABI: `6.1.0-45`, or `6.12.57+deb12`.
fn newest<'a>(series: &str, names: &'a str) -> Option<&'a str> {
    let abi = |name: &str| {
        let version = name.strip_prefix("linux-image-")?.strip_suffix(SUFFIX)?;
        let abi = match series {
            "6.1" => version.strip_prefix("6.1.0-")?,
            _ => version
                .strip_prefix(series)?
                .strip_prefix('.')?
                .strip_suffix("+deb12")?,
        };
        abi.parse::<u32>().ok()
    };
    names
        .lines()
        .filter_map(|name| Some((abi(name)?, name)))
        .max()
        .map(|(_, name)| name)
}

/// Makes a whole Debian with its own kernel and initramfs, as a guest needs it: with a network, and root without a
/// password. The archive is not compressed, because the lab takes longer to unpack it than it saves.
fn debian(session: &Session) -> Done {
    let place = session.places.cache.join("debian");
    if place.is_dir() {
        return Ok(());
    }
    let part = session.places.cache.join("debian.part");
    file_system(session, &part, empty_folder(&part))?;
    let to = part.display();
    let mut make = as_root(session, "mmdebstrap");
    make.args([
        "--variant=minbase",
        "--include=linux-image-cloud-amd64,systemd-sysv,udev,iproute2,iputils-ping",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        r#"--customize-hook=echo debian > "$1/etc/hostname"; chroot "$1" passwd --delete root"#,
        r#"--customize-hook=printf "[Match]\nType=ether\n[Network]\nAddress=10.0.0.2/24\n" > "$1/etc/systemd/network/lan.network""#,
        r#"--customize-hook=chroot "$1" systemctl enable systemd-networkd"#,
        &format!("--customize-hook=download vmlinuz '{to}/vmlinuz'"),
        &format!("--customize-hook=download initrd.img '{to}/initrd.img'"),
        r#"--customize-hook=rm "$1"/boot/*"#,
        "bookworm",
    ]);
    make.arg(part.join("tree.tar"));
    Step::new("make-debian", 900, make).run(session)?;
    file_system(session, &place, fs::rename(&part, &place))
}

/// A command that runs as root, by `sudo` if this process does not.
fn as_root(session: &Session, program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return session.places.command(program);
    }
    let mut sudo = session.places.command("sudo");
    sudo.args(["-n", program]);
    sudo
}

fn empty_folder(path: &Path) -> io::Result<()> {
    if path.exists() {
        fs::remove_dir_all(path)?;
    }
    fs::create_dir_all(path)
}

fn file_system(session: &Session, path: &Path, result: io::Result<()>) -> Result<(), Failed> {
    result.map_err(|error| session.trouble(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::newest;

    const NAMES: &str = "linux-image-6.1.0-9-cloud-amd64-unsigned\n\
                         linux-image-6.1.0-45-cloud-amd64-unsigned\n\
                         linux-image-6.1.0-46-amd64-unsigned\n\
                         linux-image-6.12.9+deb12-cloud-amd64-unsigned\n\
                         linux-image-6.12.57+deb12-cloud-amd64-unsigned\n\
                         linux-image-6.12.57+deb12-rt-amd64-unsigned\n";

    #[test]
    fn the_newest_kernel_is_the_one_with_the_highest_number() {
        let newest = |series| newest(series, NAMES);
        let v6_1 = "linux-image-6.1.0-45-cloud-amd64-unsigned";
        let v6_12 = "linux-image-6.12.57+deb12-cloud-amd64-unsigned";
        assert_eq!([newest("6.1"), newest("6.12")], [Some(v6_1), Some(v6_12)]);
        assert_eq!(newest("6.13"), None);
    }
}
