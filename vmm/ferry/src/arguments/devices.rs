//! Options for the virtio devices of a guest and their host side, shared by `ferry run` and `ferry receive`.

use std::path::PathBuf;

use clap::Args;

use super::values::{parse_serial, parse_switch};
use vmm::config::{
    BalloonConfig, DevicesConfig, DiskConfig, ImageType, MacAddress, NetConfig, RateLimiterConfig,
    RngConfig, SerialConfig, SerialMode, TokenBucket, VsockConfig,
};
use vmm::migrate::check_socket_path;
use vmm::size::parse_size;

/// Default vsock CID of a guest. CIDs 0 to 2 are reserved.
const GUEST_CID: u64 = 3;

/// Names of the rate limiter's options: the size of a bucket and the time in which it refills.
const LIMITS: &str = "bw_size, bw_refill_time, ops_size, ops_refill_time";

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Devices")]
#[group(id = "devices", multiple = true)]
pub(crate) struct DeviceArguments {
    /// Disk on a raw image: path=FILE[,image_type=raw][,readonly=on|off][,id=TEXT][,LIMITS]; or disk
    /// of a vhost-user back end: vhost_user=on,socket=PATH[,id=TEXT]. Repeat the option for more
    /// disks. LIMITS are bw_size=BYTES and ops_size=N, per second or per bw_refill_time=MS and
    /// ops_refill_time=MS
    #[arg(long, value_name = "DISK", value_parser = parse_disk)]
    disk: Vec<DiskConfig>,
    /// Network interface on an existing tap: tap=NAME[,mac=ADDRESS][,mtu=N][,LIMITS]; or on the
    /// inherited descriptor N of a tap: fd=N. Repeat the option for more interfaces. LIMITS are those
    /// of a disk and apply to each direction
    #[arg(long, value_name = "NET", value_parser = parse_net)]
    net: Vec<NetConfig>,
    /// Vsock device, connected to Unix sockets of the host: socket=PATH[,cid=N] [default cid: 3]
    #[arg(long, value_name = "VSOCK", value_parser = parse_vsock)]
    vsock: Option<VsockConfig>,
    /// Entropy device with random bytes of the host
    #[arg(long)]
    rng: bool,
    /// Memory balloon: size=SIZE[,deflate_on_oom=on|off][,free_page_reporting=on|off]
    #[arg(long, value_name = "BALLOON", value_parser = parse_balloon)]
    balloon: Option<BalloonConfig>,
    /// Virtio console (hvc0 in Linux) besides the serial port: null or file:PATH
    #[arg(long, value_name = "TARGET", value_parser = parse_console)]
    console: Option<SerialConfig>,
}

impl DeviceArguments {
    /// Returns the configuration of the devices.
    pub(crate) fn config(self) -> DevicesConfig {
        DevicesConfig {
            disks: self.disk,
            net: self.net,
            rng: self.rng.then(RngConfig::default),
            vsock: self.vsock,
            balloon: self.balloon,
            console: self.console,
        }
    }
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut disk = DiskConfig::default();
    for part in parts(text, "path") {
        let part = part?;
        if parse_limit(&mut disk.rate_limiter_config, part)? == LimitPart::Taken {
            continue;
        }
        match part {
            ("path", value) => disk.path = Some(value.into()),
            ("image_type", "raw") => disk.image_type = Some(ImageType::Raw),
            ("image_type", value) => {
                return Err(format!(
                    "image_type={value}: only raw images are supported; convert the image with `qemu-img convert -O raw`"
                ));
            }
            ("readonly", value) => disk.readonly = parse_switch(text, value)?,
            ("id", value) => disk.id = Some(value.into()),
            ("vhost_user", value) => disk.vhost_user = parse_switch(text, value)?,
            ("socket", value) => {
                check_socket_path(value.as_ref()).map_err(|error| error.to_string())?;
                disk.vhost_socket = Some(value.into());
            }
            (name, _) => {
                let known =
                    format!("path, image_type=raw, readonly, id, vhost_user, socket, {LIMITS}");
                return Err(unknown(name, &known));
            }
        }
    }
    match (disk.vhost_user, &disk.path, &disk.vhost_socket) {
        (false, Some(_), None) | (true, None, Some(_)) if !(disk.vhost_user && disk.readonly) => {
            Ok(disk)
        }
        (false, None, None) => Err("a disk needs an image: add path=FILE".into()),
        (false, _, Some(_)) => {
            Err("socket=PATH is for vhost-user back ends: add vhost_user=on".into())
        }
        (true, _, None) => {
            Err("a vhost-user disk needs the socket of its back end: add socket=PATH".into())
        }
        _ => Err(
            "a vhost-user back end owns the image and decides whether it is read-only: \
             remove path and readonly"
                .into(),
        ),
    }
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    let mut net = NetConfig {
        tap: None,
        fds: None,
        mac: MacAddress::random(),
        mtu: None,
        rate_limiter_config: None,
    };
    for part in parts(text, "tap") {
        let part = part?;
        if parse_limit(&mut net.rate_limiter_config, part)? == LimitPart::Taken {
            continue;
        }
        let number = |_| format!("{}={} is not a valid number", part.0, part.1);
        match part {
            ("tap", value) => net.tap = Some(value.into()),
            ("fd", value) => net.fds = Some(vec![value.parse().map_err(number)?]),
            ("mac", value) => net.mac = value.parse()?,
            ("mtu", value) => net.mtu = Some(value.parse().map_err(number)?),
            (name, _) => return Err(unknown(name, &format!("tap, fd, mac, mtu, {LIMITS}"))),
        }
    }
    match (&net.tap, &net.fds) {
        (Some(_), None) | (None, Some(_)) => Ok(net),
        _ => Err("a network interface needs exactly one tap: give tap=NAME or fd=N".into()),
    }
}

fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let mut vsock = VsockConfig {
        cid: GUEST_CID,
        socket: PathBuf::new(),
    };
    for part in parts(text, "socket") {
        match part? {
            ("socket", value) => vsock.socket = value.into(),
            ("cid", value) => {
                vsock.cid = value
                    .parse()
                    .map_err(|_| format!("cid={value} is not a valid number"))?;
            }
            (name, _) => return Err(unknown(name, "socket, cid")),
        }
    }
    if vsock.socket.as_os_str().is_empty() {
        return Err("a vsock device needs a Unix socket on the host: add socket=PATH".into());
    }
    Ok(vsock)
}

fn parse_balloon(text: &str) -> Result<BalloonConfig, String> {
    let mut balloon = BalloonConfig::default();
    for part in parts(text, "size") {
        match part? {
            ("size", value) => balloon.size = parse_size(value)?,
            ("deflate_on_oom", value) => balloon.deflate_on_oom = parse_switch(text, value)?,
            ("free_page_reporting", value) => {
                balloon.free_page_reporting = parse_switch(text, value)?
            }
            (name, _) => {
                let known = "size, deflate_on_oom, free_page_reporting";
                return Err(unknown(name, known));
            }
        }
    }
    Ok(balloon)
}

/// Parses the other end of a virtio console. It cannot be the terminal, which the serial port may use.
fn parse_console(text: &str) -> Result<SerialConfig, String> {
    match parse_serial(text) {
        Ok(console) if console.mode != SerialMode::Tty => Ok(console),
        _ => Err(format!(
            "{text:?} is not allowed for a console: use null or file:PATH"
        )),
    }
}

/// Splits a value into its `NAME=VALUE` parts, which are separated by commas. `usual` is the name that an error suggests for a
/// part without a name.
fn parts<'a>(
    text: &'a str,
    usual: &'a str,
) -> impl Iterator<Item = Result<(&'a str, &'a str), String>> {
    text.split(',').map(move |part| match part.split_once('=') {
        Some((name, "")) => Err(format!("the value of {name}= is empty")),
        Some(pair) => Ok(pair),
        None if part.is_empty() => Err(format!("{part:?} is not NAME=VALUE")),
        None => Err(format!(
            "{part:?} is not NAME=VALUE; did you mean {usual}={part}?"
        )),
    })
}

fn unknown(name: &str, known: &str) -> String {
    format!("unknown name {name:?}; the names are {known}")
}

/// Whether a part of an option belongs to the rate limiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LimitPart {
    Taken,
    Other,
}

/// Adds a `NAME=VALUE` part to the rate limits if its name is one of [`LIMITS`]. The refill time of a bucket is one second
/// by default.
fn parse_limit(
    limits: &mut Option<RateLimiterConfig>,
    (name, value): (&str, &str),
) -> Result<LimitPart, String> {
    let mut buckets = limits.unwrap_or_default();
    let (bucket, field) = match name.split_once('_') {
        Some(("bw", field)) => (&mut buckets.bandwidth, field),
        Some(("ops", field)) => (&mut buckets.ops, field),
        _ => return Ok(LimitPart::Other),
    };
    let bucket = bucket.get_or_insert(TokenBucket {
        size: 0,
        refill_time: 1000,
    });
    match field {
        "size" => bucket.size = parse_size(value)?,
        "refill_time" => {
            bucket.refill_time = value
                .parse()
                .map_err(|_| format!("{name}={value} is not a number of milliseconds"))?;
        }
        _ => return Ok(LimitPart::Other),
    }
    *limits = Some(buckets);
    Ok(LimitPart::Taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_with_their_options() {
        let disk = parse_disk("path=/d.img,readonly=on,id=root").unwrap();
        assert_eq!((disk.readonly, disk.id.as_deref()), (true, Some("root")));
        let disk = parse_disk("vhost_user=on,socket=/s,id=data").unwrap();
        assert!(disk.vhost_user && disk.path.is_none());
        assert_eq!(disk.vhost_socket.as_deref(), Some("/s".as_ref()));
        let net = parse_net("tap=tap0,mac=52:54:00:12:34:56,mtu=9000").unwrap();
        assert_eq!(net.mac.to_string(), "52:54:00:12:34:56");
        assert_eq!(parse_net("fd=5").unwrap().fds, Some(vec![5]));
        assert_eq!(parse_vsock("socket=/s").unwrap().cid, GUEST_CID);
        let disk = parse_disk("path=/d.img,image_type=raw").unwrap();
        assert_eq!(disk.image_type, Some(ImageType::Raw));
        let bucket = |size, refill_time| Some(TokenBucket { size, refill_time });
        let disk = parse_disk("path=/d,bw_refill_time=500,bw_size=2M,ops_size=100").unwrap();
        let limits = disk.rate_limiter_config.unwrap();
        assert_eq!(limits.bandwidth, bucket(2 << 20, 500));
        assert_eq!(limits.ops, bucket(100, 1000));
        let net = parse_net("ops_refill_time=10,tap=t").unwrap();
        // The check of the configuration refuses a bucket without a size.
        assert_eq!(net.rate_limiter_config.unwrap().ops, bucket(0, 10));
        let balloon = parse_balloon("size=256M,free_page_reporting=on").unwrap();
        assert_eq!(
            (balloon.size, balloon.free_page_reporting),
            (256 << 20, true)
        );
    }

    #[test]
    fn errors_name_missing_and_unknown_parts() {
        for (error, why) in [
            (parse_disk("readonly=on").unwrap_err(), "path=FILE"),
            (parse_disk("socket=/s").unwrap_err(), "vhost_user=on"),
            (parse_disk("vhost_user=on").unwrap_err(), "socket=PATH"),
            (
                parse_disk("vhost_user=on,socket=/s,path=/d").unwrap_err(),
                "owns the image",
            ),
            (
                parse_disk("vhost_user=on,socket=/s,readonly=on").unwrap_err(),
                "owns the image",
            ),
            (
                parse_disk("/d.img").unwrap_err(),
                "did you mean path=/d.img?",
            ),
            (parse_disk("").unwrap_err(), "not NAME=VALUE"),
            (parse_disk("path=").unwrap_err(), "path= is empty"),
            (parse_net("tap0").unwrap_err(), "did you mean tap=tap0?"),
            (parse_vsock("/s").unwrap_err(), "did you mean socket=/s?"),
            (parse_balloon("1G").unwrap_err(), "did you mean size=1G?"),
            (parse_console("stdio").unwrap_err(), "null or file:PATH"),
            (parse_console("pty").unwrap_err(), "null or file:PATH"),
            (
                parse_disk(&format!("vhost_user=on,socket=/{}", "x".repeat(107))).unwrap_err(),
                "107 bytes",
            ),
            (
                parse_disk("path=/d,image_type=qcow2").unwrap_err(),
                "only raw images",
            ),
            (parse_disk("path=/d,direct=on").unwrap_err(), "direct"),
            (parse_disk("path=/d,bw_burst=1").unwrap_err(), "bw_burst"),
            (
                parse_disk("path=/d,bw_refill_time=1s").unwrap_err(),
                "milliseconds",
            ),
            (parse_net("tap=t,ops_size=many").unwrap_err(), "many"),
            (parse_disk("path=/d,readonly=yes").unwrap_err(), "on or off"),
            (parse_net("mac=52:54:00:12:34:56").unwrap_err(), "one tap"),
            (parse_net("tap=t,fd=3").unwrap_err(), "one tap"),
            (parse_net("tap=t,mac=1").unwrap_err(), "52:54:00:12:34:56"),
            (parse_net("fd=x").unwrap_err(), "fd=x"),
            (parse_vsock("cid=3").unwrap_err(), "socket=PATH"),
            (parse_balloon("size=lots").unwrap_err(), "lots"),
        ] {
            assert!(error.contains(why), "{error}");
        }
    }
}
