//! Opens the host resources of each device of a configuration: images, taps, sockets and files.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use devices::virtio::{
    self, Access, Balloon, BalloonControl, Block, BlockOptions, Console, ConsoleOutput, Device,
    Interrupt, Net, Rng, VhostUser, Vsock,
};
use ept::Notifier;
use kvm_ioctls::VmFd;

use super::DevicesError;
use super::attach::{OpenedDevice, Server};
use super::disk::{DiskError, DiskImage};
use super::tap::HostTap;
use crate::boot::VirtioMmioResources;
use crate::config::{
    BalloonConfig, DevicesConfig, DiskConfig, NetConfig, SerialConfig, SerialMode, VsockConfig,
};
use crate::machine::MachineError;
use crate::machine::facts::{DeviceFacts, DiskAccess};
use crate::machine::port_devices::interrupt;
use crate::memory::{DeviceMemory, GuestRam, NotifiedDiscard};

type Result<T> = std::result::Result<T, MachineError>;

/// Parts of the machine that devices need when they are opened.
pub(in crate::machine) struct OpenContext<'a> {
    pub(in crate::machine) vm: &'a VmFd,
    pub(in crate::machine) ram: &'a Arc<GuestRam>,
    pub(in crate::machine) notifier: &'a Notifier,
}

/// Parts of one device, before it has a name and resources.
struct DeviceParts {
    server: Server,
    facts: DeviceFacts,
    image: Option<DiskImage>,
    balloon: Option<BalloonControl>,
}

impl DeviceParts {
    fn new(device: impl Device<DeviceMemory> + 'static, facts: DeviceFacts) -> Self {
        Self {
            server: Server::Worker(Box::new(device)),
            facts,
            image: None,
            balloon: None,
        }
    }
}

/// Opens all devices of `config`, in the order in which the guest enumerates them.
pub(in crate::machine) fn open(
    config: &DevicesConfig,
    with: &OpenContext<'_>,
) -> Result<Vec<OpenedDevice>> {
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
        let rng = |_: &Interrupt| Ok(DeviceParts::new(Rng::new(), DeviceFacts::Rng));
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

/// Checks that the images and taps of `config` exist and are usable, without locking the images or attaching to the
/// taps.
///
/// # Errors
/// Returns the error of the first image or tap that is missing or unusable.
pub fn check_host_resources(config: &DevicesConfig) -> std::result::Result<(), DevicesError> {
    for disk in &config.disks {
        if let Some(path) = &disk.path {
            DiskImage::open(path, access(disk), disk.image_type)?;
        }
    }
    for tap in config.net.iter().filter_map(|net| net.tap.as_deref()) {
        HostTap::check_exists(tap)?;
    }
    Ok(())
}

/// Returns the access that the guest needs to the image of `disk`.
fn access(disk: &DiskConfig) -> Access {
    match disk.readonly {
        true => Access::ReadOnly,
        false => Access::ReadWrite,
    }
}

/// Assigns register windows and interrupt lines to devices, in order.
struct ResourceAllocator<'a> {
    with: &'a OpenContext<'a>,
    /// Number of the next device.
    next: u32,
}

impl ResourceAllocator<'_> {
    /// Assigns the next resources to the device `name`, and opens the device by `open`.
    fn put(
        &mut self,
        name: String,
        open: impl FnOnce(&Interrupt) -> Result<DeviceParts>,
    ) -> Result<OpenedDevice> {
        let Some(resources) = VirtioMmioResources::nth(self.next) else {
            let most = self.next;
            return Err(DevicesError::TooMany { name, most }.into());
        };
        self.next += 1;
        let interrupt = Interrupt::new(interrupt(self.with.vm, resources.gsi)?);
        let part = open(&interrupt)?;
        Ok(OpenedDevice {
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

/// Returns a function that adds the device `name` and its resource `what` to an error of the host, for `map_err`.
fn host(name: &str, what: &'static str) -> impl Fn(io::Error) -> DevicesError {
    let name = name.to_owned();
    move |source| DevicesError::Host {
        name: name.clone(),
        what,
        source,
    }
}

/// Opens a disk that this process serves from a raw image.
fn open_disk(name: &str, config: &DiskConfig) -> Result<DeviceParts> {
    let access = access(config);
    let path = config.path.as_deref().unwrap_or(Path::new(""));
    let opened = DiskImage::open(path, access, config.image_type);
    let (image, file) = opened.map_err(DevicesError::from)?;
    let block = Block::new(BlockOptions {
        file,
        access,
        id: config.id.clone().unwrap_or_else(|| name.to_owned()),
        rate_limit: config.rate_limiter_config.unwrap_or_default().limit(),
    })
    .map_err(host(name, "its image or its rate limiter"))?;
    let sectors = block.sectors();
    if sectors == 0 {
        return Err(DevicesError::from(DiskError::Empty(image.path().into())).into());
    }
    let access = match access {
        Access::ReadOnly => DiskAccess::ReadOnly,
        Access::ReadWrite => DiskAccess::ReadWrite,
    };
    let mut part = DeviceParts::new(block, DeviceFacts::Disk { sectors, access });
    part.image = Some(image);
    Ok(part)
}

/// Connects to a vhost-user back end. The destination of a migration must have a back end with the same ID, size and
/// features.
fn open_vhost_user(
    socket: &Path,
    config: &DiskConfig,
    with: &OpenContext<'_>,
    interrupt: &Interrupt,
) -> Result<DeviceParts> {
    let memory = DeviceMemory::new(with.ram).map_err(MachineError::DeviceMemory)?;
    let back_end = VhostUser::connect(virtio::VhostUserOptions {
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
    Ok(DeviceParts {
        server: Server::VhostUser(back_end),
        facts,
        image: None,
        balloon: None,
    })
}

/// Opens a network interface on its tap.
fn open_net(name: &str, config: &NetConfig) -> Result<DeviceParts> {
    let tap = match (&config.tap, config.fds.as_deref()) {
        (Some(tap), _) => HostTap::open(tap),
        (None, fds) => HostTap::passed(fds.and_then(|fds| fds.first()).copied().unwrap_or(-1)),
    }
    .map_err(DevicesError::from)?;
    let limit = config.rate_limiter_config.unwrap_or_default().limit();
    let net = Net::new(virtio::NetOptions {
        tap: Box::new(tap),
        mac: config.mac.0,
        mtu: config.mtu,
        receive_limit: limit,
        transmit_limit: limit,
    })
    .map_err(host(name, "the timers of its rate limiters"))?;
    Ok(DeviceParts::new(net, DeviceFacts::Net { mtu: config.mtu }))
}

/// Opens the socket device, which creates its Unix socket.
fn open_vsock(config: &VsockConfig) -> Result<DeviceParts> {
    let vsock = Vsock::new(virtio::VsockOptions {
        guest_cid: config.cid,
        path: config.socket.clone(),
    })
    .map_err(DevicesError::from)?;
    Ok(DeviceParts::new(vsock, DeviceFacts::Vsock))
}

/// Creates the balloon, which releases guest memory inside notifier ranges.
fn open_balloon(
    config: BalloonConfig,
    with: &OpenContext<'_>,
    interrupt: &Interrupt,
) -> DeviceParts {
    let discard = NotifiedDiscard {
        ram: Arc::clone(with.ram),
        notifier: with.notifier.clone(),
    };
    let (balloon, control) = Balloon::new(
        virtio::BalloonOptions {
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
    let mut part = DeviceParts::new(balloon, facts);
    part.balloon = Some(control);
    part
}

/// Opens the console. Only its output is connected, because it has no input.
fn open_console(config: &SerialConfig) -> Result<DeviceParts> {
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
    let (console, _no_input) =
        Console::new(output).map_err(host("_console0", "its input event"))?;
    Ok(DeviceParts::new(console, DeviceFacts::Console))
}
