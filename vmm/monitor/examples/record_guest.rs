//! Records a paused guest into a file: the stream of a migration, as later versions must read it for ever.
//!
//! ```text
//! cargo run -p ferry-vmm --example record_guest -- vmm/monitor/tests/recordings/v2-hello.ferry
//! ```
//!
//! The guest is a kernel that was loaded and has not run yet, with one device of each kind that needs nothing from the
//! host. It needs a usable /dev/kvm.

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::Arc;

use migration::{Attempt, Recording, SendOptions, send};
use vmm::boot::Payload;
use vmm::config::{DevicesConfig, DiskConfig, VmConfig};
use vmm::kvm::host::Host;
use vmm::machine::{EmptyMachine, Live, Shape, Wiring};
use vmm::memory::Backing;
use vmm::migrate::MachineSource;

const DEVICES: &[u8] = br#"{"payload":{},"rng":{"src":"/dev/urandom"},"balloon":{"size":0},"console":{"mode":"Null"}}"#;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("name the file to write")?;
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("hello");
    std::fs::write(&kernel, guest_images::HELLO)?;
    let image = folder.path().join("disk.img");
    File::create(&image)?.set_len(1 << 20)?;

    let shape = Shape {
        cpus: 2,
        memory_bytes: 4 << 20,
        backing: Backing::Memfd,
        dirty_log: None,
    };
    let mut empty = EmptyMachine::new(&Arc::new(Host::open()?), &shape)?;
    empty.open_devices(&DevicesConfig {
        disks: vec![DiskConfig {
            path: Some(image),
            ..DiskConfig::default()
        }],
        ..VmConfig::from_json(DEVICES)?.devices()
    })?;
    let payload = Payload {
        kernel,
        initramfs: None,
        command_line: String::new(),
    };
    let wiring = Wiring {
        serial_output: Box::new(io::sink()),
        on_end: Arc::new(|end| eprintln!("the guest ended: {end:?}")),
        on_loss: Arc::new(|device, why| eprintln!("{device}: {why}")),
    };
    let machine = empty.boot(&payload, wiring)?;

    let mut source = MachineSource::new(Live::Paused(machine));
    let recording = Recording::new(File::create(&path)?);
    let attempt = Attempt::new(path.as_str());
    send(&mut source, recording, &SendOptions::default(), &attempt)?;
    println!("{path}: {} bytes", std::fs::metadata(&path)?.len());
    Ok(())
}
