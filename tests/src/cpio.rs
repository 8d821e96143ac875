//! Writes archives in the initramfs format of the Linux kernel: cpio "newc".
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`. A writer of our own can add device nodes
//! without root, which the program `cpio` cannot.

/// File type of an entry: the upper bits of its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
    Link,
    CharacterDevice,
}

impl Kind {
    fn bits(self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::File => 0o100_000,
            Self::Link => 0o120_000,
            Self::CharacterDevice => 0o020_000,
        }
    }
}

/// Archive under construction. Paths are relative to the root and have no leading `/`.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory. Its parents must have been added before.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, Kind::Directory.bits() | 0o755, (0, 0), &[]);
    }

    /// Adds a regular file with the given permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, Kind::File.bits() | permissions, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, Kind::Link.bits() | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(
            path,
            Kind::CharacterDevice.bits() | 0o600,
            (major, minor),
            &[],
        );
    }

    /// Closes the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a newc entry holds less than 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        let (owner, group, links, time) = (0, 0, 1, 0);
        let (on_major, on_minor, check) = (0, 0, 0);
        let fields = [
            self.entries,
            mode,
            owner,
            group,
            links,
            time,
            size,
            on_major,
            on_minor,
            device.0,
            device.1,
            name_size,
            check,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Pads a name or a content to a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    #[test]
    fn another_reader_unpacks_it() {
        let mut archive = Archive::default();
        archive.directory("a");
        archive.file("a/odd", 0o755, b"12345");
        archive.link("a/link", "odd");
        let folder = tempfile::tempdir().unwrap();
        let packed = folder.path().join("x.cpio");
        fs::write(&packed, archive.finish()).unwrap();
        let reader = Command::new("busybox")
            .args(["cpio", "-i"])
            .current_dir(folder.path())
            .stdin(fs::File::open(packed).unwrap())
            .stderr(Stdio::inherit())
            .status()
            .expect("busybox (package busybox-static) is installed");
        assert!(reader.success());
        let unpacked = folder.path().join("a/odd");
        assert_eq!(fs::read(folder.path().join("a/link")).unwrap(), b"12345");
        assert_eq!(
            fs::metadata(unpacked).unwrap().permissions().mode() & 0o777,
            0o755
        );
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut archive = Archive::default();
        archive.file("ab", 0o644, b"xyz");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // Header of 110 bytes, name of 3, padded to 116.
        assert_eq!(&bytes[110..113], b"ab\0");
        assert_eq!(&bytes[116..119], b"xyz");
    }
}
