//! Opens the host's side of each device of a configuration: images, taps, sockets.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use devices::virtio::{
    self, Access, Balloon, BalloonControl, Block, BlockConfig, Console, ConsoleOutput, Device,
    Interrupt, Net, Rng, VhostUser, Vsock,
};
use ept::Notifier;
use kvm_ioctls::VmFd;

use super::disk::{DiskError, DiskImage};
use super::tap::HostTap;
use super::{DevicesError, Opened, Server};
use crate::boot::VirtioMmioResources;
use crate::config::{
    BalloonConfig, DevicesConfig, DiskConfig, NetConfig, SerialConfig, SerialMode, VsockConfig,
};
use crate::machine::MachineError;
use crate::machine::facts::{DeviceFacts, DiskAccess};
use crate::machine::port_devices::interrupt;
use crate::memory::{DeviceMemory, GuestRam, NotifiedDiscard};

type Result<T> = std::result::Result<T, MachineError>;

/// What a device is opened with.
pub(in crate::machine) struct Opening<'a> {
    pub(in crate::machine) vm: &'a VmFd,
    pub(in crate::machine) ram: &'a Arc<GuestRam>,
    pub(in crate::machine) notifier: &'a Notifier,
}

/// One device: what it is, and what only its kind has.
struct Part {
    server: Server,
    facts: DeviceFacts,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
}

impl Part {
    fn new(device: impl Device<DeviceMemory> + 'static, facts: DeviceFacts) -> Self {
        Self {
            server: Server::Worker(Box::new(device)),
            facts,
            image: None,
            balloon: None,
        }
    }
}

/// Opens all devices of `config`, in the order in which the guest finds them.
pub(in crate::machine) fn open(config: &DevicesConfig, with: &Opening<'_>) -> Result<Vec<Opened>> {
    let mut resources = ResourceAllocator { with, next: 0 };
    let mut opened = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let name = format!("_disk{index}");
        let open = |interrupt: &Interrupt| match &disk.vhost_socket {
            Some(socket) => open_vhost_user(socket, disk, with, interrupt),
            None => open_disk(&name, disk),
        };
        opened.push(resources.put(name.clone(), open)?);
    }
    for (index, net) in config.net.iter().enumerate() {
        let name = format!("_net{index}");
        opened.push(resources.put(name.clone(), |_| open_net(&name, net))?);
    }
    if config.rng.is_some() {
        let rng = |_: &Interrupt| Ok(Part::new(Rng::new(), DeviceFacts::Rng));
        opened.push(resources.put("_rng0".into(), rng)?);
    }
    if let Some(vsock) = &config.vsock {
        opened.push(resources.put("_vsock0".into(), |_| open_vsock(vsock))?);
    }
    if let Some(balloon) = config.balloon {
        let balloon = |interrupt: &Interrupt| Ok(open_balloon(balloon, with, interrupt));
        opened.push(resources.put("_balloon0".into(), balloon)?);
    }
    if let Some(console) = &config.console {
        opened.push(resources.put("_console0".into(), |_| open_console(console))?);
    }
    Ok(opened)
}

/// Looks at images and taps that will be opened later, and takes none of them.
///
/// # Errors
/// The first that is not there, or is something else.
pub fn look(config: &DevicesConfig) -> std::result::Result<(), DevicesError> {
    for disk in &config.disks {
        if let Some(path) = &disk.path {
            DiskImage::open(path, access(disk), disk.image_type)?;
        }
    }
    for tap in config.net.iter().filter_map(|net| net.tap.as_deref()) {
        HostTap::is_there(tap)?;
    }
    Ok(())
}

fn access(disk: &DiskConfig) -> Access {
    match disk.readonly {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    }
}

/// Assigns register windows and interrupt lines to devices, in order.
struct ResourceAllocator<'a> {
    with: &'a Opening<'a>,
    next: u32,
}

impl ResourceAllocator<'_> {
    fn put(
        &mut self,
        name: String,
        open: impl FnOnce(&Interrupt) -> Result<Part>,
    ) -> Result<Opened> {
        let Some(resources) = VirtioMmioResources::nth(self.next) else {
            let most = self.next;
            return Err(DevicesError::TooMany { name, most }.into());
        };
        self.next += 1;
        let interrupt = Interrupt::new(interrupt(self.with.vm, resources.gsi)?);
        let part = open(&interrupt)?;
        Ok(Opened {
            name,
            resources,
            interrupt,
            server: part.server,
            facts: part.facts,
            image: part.image,
            balloon: part.balloon,
        })
    }
}

/// For `map_err`: the host would not give a part of the device `name`.
fn host(name: &str, what: &'static str) -> impl Fn(io::Error) -> DevicesError {
    let name = name.to_owned();
    move |source| DevicesError::Host {
        name: name.clone(),
        what,
        source,
    }
}

fn open_disk(name: &str, config: &DiskConfig) -> Result<Part> {
    let access = access(config);
    let path = config.path.as_deref().unwrap_or(Path::new(""));
    let opened = DiskImage::open(path, access, config.image_type);
    let (image, file) = opened.map_err(DevicesError::from)?;
    let block = Block::new(BlockConfig {
        file,
        access,
        id: config.id.clone().unwrap_or_else(|| name.to_owned()),
        rate_limit: config.rate_limiter_config.unwrap_or_default().limit(),
    })
    .map_err(host(name, "its image"))?;
    let sectors = block.sectors();
    if sectors == 0 {
        return Err(DevicesError::from(DiskError::Empty(image.path().into())).into());
    }
    let access = match access {
        Access::ReadOnly => DiskAccess::ReadOnly,
        Access::ReadWrite => DiskAccess::ReadWrite,
    };
    let mut part = Part::new(block, DeviceFacts::Disk { sectors, access });
    part.image = Some(image);
    Ok(part)
}

/// The other side of a migration has to have the same disk, and offer the same to the guest.
fn open_vhost_user(
    socket: &Path,
    config: &DiskConfig,
    with: &Opening<'_>,
    interrupt: &Interrupt,
) -> Result<Part> {
    let memory = DeviceMemory::new(with.ram).map_err(MachineError::DeviceMemory)?;
    let back_end = VhostUser::connect(virtio::VhostUserConfig {
        socket: socket.into(),
        memory,
        interrupt: interrupt.clone(),
    })
    .map_err(DevicesError::from)?;
    let facts = DeviceFacts::VhostUserDisk {
        id: config.id.clone(),
        sectors: back_end.sectors(),
        features: back_end.features(),
    };
    Ok(Part {
        server: Server::VhostUser(back_end),
        facts,
        image: None,
        balloon: None,
    })
}

fn open_net(name: &str, config: &NetConfig) -> Result<Part> {
    let tap = match (&config.tap, config.fds.as_deref()) {
        (Some(tap), _) => HostTap::open(tap),
        (None, fds) => HostTap::passed(fds.and_then(|fds| fds.first()).copied().unwrap_or(-1)),
    }
    .map_err(DevicesError::from)?;
    let limit = config.rate_limiter_config.unwrap_or_default().limit();
    let net = Net::new(virtio::NetConfig {
        tap: Box::new(tap),
        mac: config.mac.0,
        mtu: config.mtu,
        receive_limit: limit,
        transmit_limit: limit,
    })
    .map_err(host(name, "its timers"))?;
    Ok(Part::new(net, DeviceFacts::Net { mtu: config.mtu }))
}

fn open_vsock(config: &VsockConfig) -> Result<Part> {
    let vsock = Vsock::new(virtio::VsockConfig {
        guest_cid: config.cid,
        path: config.socket.clone(),
    })
    .map_err(DevicesError::from)?;
    Ok(Part::new(vsock, DeviceFacts::Vsock))
}

fn open_balloon(config: BalloonConfig, with: &Opening<'_>, interrupt: &Interrupt) -> Part {
    let discard = NotifiedDiscard {
        ram: Arc::clone(with.ram),
        notifier: with.notifier.clone(),
    };
    let (balloon, control) = Balloon::new(
        virtio::BalloonConfig {
            target_pages: config.pages(),
            deflate_on_oom: config.deflate_on_oom,
            free_page_reporting: config.free_page_reporting,
        },
        Box::new(discard),
        interrupt.clone(),
    );
    let facts = DeviceFacts::Balloon {
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
    };
    let mut part = Part::new(balloon, facts);
    part.balloon = Some(control);
    part
}

/// A console's output; there is no input.
fn open_console(config: &SerialConfig) -> Result<Part> {
    let output: ConsoleOutput = match (&config.mode, &config.file) {
        (SerialMode::File, Some(path)) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path);
            Box::new(file.map_err(|source| DevicesError::Console {
                path: path.display().to_string(),
                source,
            })?)
        }
        _ => Box::new(io::sink()),
    };
    let (console, _no_input) = Console::new(output).map_err(host("_console0", "an event"))?;
    Ok(Part::new(console, DeviceFacts::Console))
}
