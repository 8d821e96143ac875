//! The options that name the host's side of devices: alike for `ferry run` and `ferry receive`.

use std::path::PathBuf;

use clap::Args;

use super::arguments::{on_off, parse_serial};
use vmm::config::{
    BalloonConfig, DevicesConfig, DiskConfig, ImageType, MacAddress, NetConfig, RateLimiterConfig,
    RngConfig, SerialConfig, SerialMode, TokenBucket, VsockConfig,
};
use vmm::migrate::check_socket_path;
use vmm::size::parse_size;

/// The guest's address where none is given: the first that a guest can have.
const GUEST_CID: u64 = 3;

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Devices")]
pub(super) struct DeviceArguments {
    /// A disk over a raw image: path=FILE[,image_type=raw][,readonly=on|off][,id=TEXT][,LIMITS]; or one
    /// that a vhost-user back end serves: vhost_user=on,socket=PATH[,id=TEXT]. Once for each disk.
    /// LIMITS are bw_size=BYTES and ops_size=N, in a second, or in bw_refill_time=MS and ops_refill_time=MS
    #[arg(long, value_name = "DISK", value_parser = parse_disk)]
    pub(super) disk: Vec<DiskConfig>,
    /// A network interface over a tap that is there: tap=NAME[,mac=ADDRESS][,mtu=N][,LIMITS]; or over a
    /// passed descriptor of one, with fd=N. Once for each; LIMITS are those of a disk, in each direction
    #[arg(long, value_name = "NET", value_parser = parse_net)]
    pub(super) net: Vec<NetConfig>,
    /// Sockets between guest and host, as Unix sockets here: socket=PATH[,cid=N] [default cid: 3]
    #[arg(long, value_name = "VSOCK", value_parser = parse_vsock)]
    pub(super) vsock: Option<VsockConfig>,
    /// Random bytes of the host for the guest
    #[arg(long)]
    pub(super) rng: bool,
    /// A balloon that takes memory from the guest:
    /// size=SIZE[,deflate_on_oom=on|off][,free_page_reporting=on|off]
    #[arg(long, value_name = "BALLOON", value_parser = parse_balloon)]
    pub(super) balloon: Option<BalloonConfig>,
    /// A virtio console (hvc0 in Linux) beside the serial port: null, or file:PATH
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    pub(super) console: Option<SerialConfig>,
}

impl DeviceArguments {
    /// Whether any of them was given.
    pub(super) fn are_given(&self) -> bool {
        let Self {
            disk,
            net,
            vsock,
            rng,
            balloon,
            console,
        } = self;
        !disk.is_empty()
            || !net.is_empty()
            || *rng
            || vsock.is_some()
            || balloon.is_some()
            || console.is_some()
    }

    pub(super) fn config(&self) -> DevicesConfig {
        DevicesConfig {
            disks: self.disk.clone(),
            net: self.net.clone(),
            rng: self.rng.then(RngConfig::default),
            vsock: self.vsock.clone(),
            balloon: self.balloon,
            console: self.console.clone(),
        }
    }
}

/// The parts of an option, each `NAME=VALUE`. Values have no comma. `first` is the name that is forgotten most easily.
fn parts<'a>(
    text: &'a str,
    first: &'a str,
) -> impl Iterator<Item = Result<(&'a str, &'a str), String>> {
    text.split(',').map(move |part| match part.split_once('=') {
        Some((name, "")) => Err(format!("the value of {name}= is empty")),
        Some(pair) => Ok(pair),
        None if part.is_empty() => Err(format!("{part:?} is not NAME=VALUE")),
        None => Err(format!(
            "{part:?} is not NAME=VALUE; is {first}={part} meant?"
        )),
    })
}

fn unknown(name: &str, known: &str) -> String {
    format!("there is no {name:?} here: {known}")
}

/// What limits are said with: how much, and in which time it may be used again.
const LIMITS: &str = "bw_size, bw_refill_time, ops_size, ops_refill_time";

/// Takes a part that is about limits; false for another one. A bucket that nothing more is said of fills in a second.
fn parse_limit(
    limits: &mut Option<RateLimiterConfig>,
    (name, value): (&str, &str),
) -> Result<bool, String> {
    let buckets = limits.unwrap_or_default();
    let (bucket, field) = match name.split_once('_') {
        Some(("bw", field)) => (buckets.bandwidth, field),
        Some(("ops", field)) => (buckets.ops, field),
        _ => return Ok(false),
    };
    let mut bucket = bucket.unwrap_or(TokenBucket {
        size: 0,
        refill_time: 1000,
    });
    match field {
        "size" => bucket.size = parse_size(value)?,
        "refill_time" => {
            bucket.refill_time = value
                .parse()
                .map_err(|_| format!("{name}={value} is no number of milliseconds"))?;
        }
        _ => return Ok(false),
    }
    let limits = limits.insert(buckets);
    match name.starts_with("bw") {
        true => limits.bandwidth = Some(bucket),
        false => limits.ops = Some(bucket),
    }
    Ok(true)
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut disk = DiskConfig::default();
    for part in parts(text, "path") {
        let part = part?;
        if parse_limit(&mut disk.rate_limiter_config, part)? {
            continue;
        }
        match part {
            ("path", value) => disk.path = Some(value.into()),
            ("image_type", "raw") => disk.image_type = Some(ImageType::Raw),
            ("readonly", value) => disk.readonly = on_off(text, value)?,
            ("id", value) => disk.id = Some(value.into()),
            ("vhost_user", value) => disk.vhost_user = on_off(text, value)?,
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
        (false, None, None) => Err("a disk needs its image: path=FILE".into()),
        (false, _, Some(_)) => Err("socket=PATH is a back end's: add vhost_user=on".into()),
        (true, _, None) => Err("a vhost-user disk needs its back end: socket=PATH".into()),
        _ => Err(
            "a vhost-user back end has the image, and says what may be done with it: \
             neither path nor readonly is said here"
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
        if parse_limit(&mut net.rate_limiter_config, part)? {
            continue;
        }
        let number = |_| format!("{}={} is no number that can be", part.0, part.1);
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
        _ => Err("an interface needs one tap: tap=NAME, or fd=N".into()),
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
                    .map_err(|_| format!("cid={value} is no number that can be"))?;
            }
            (name, _) => return Err(unknown(name, "socket, cid")),
        }
    }
    if vsock.socket.as_os_str().is_empty() {
        return Err("a socket device needs its place here: socket=PATH".into());
    }
    Ok(vsock)
}

fn parse_balloon(text: &str) -> Result<BalloonConfig, String> {
    let mut balloon = BalloonConfig::default();
    for part in parts(text, "size") {
        match part? {
            ("size", value) => balloon.size = parse_size(value)?,
            ("deflate_on_oom", value) => balloon.deflate_on_oom = on_off(text, value)?,
            ("free_page_reporting", value) => balloon.free_page_reporting = on_off(text, value)?,
            (name, _) => {
                let known = "size, deflate_on_oom, free_page_reporting";
                return Err(unknown(name, known));
            }
        }
    }
    Ok(balloon)
}

/// Reads where a console leads. The terminal is the serial port's.
fn parse_console(text: &str) -> Result<SerialConfig, String> {
    match parse_serial(text) {
        Ok(console) if console.mode != SerialMode::Tty => Ok(console),
        _ => Err(format!(
            "{text:?} cannot be: a console leads to null, or file:PATH"
        )),
    }
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
        // What lacks a size is refused with the configuration.
        assert_eq!(net.rate_limiter_config.unwrap().ops, bucket(0, 10));
        let balloon = parse_balloon("size=256M,free_page_reporting=on").unwrap();
        assert_eq!(
            (balloon.size, balloon.free_page_reporting),
            (256 << 20, true)
        );
    }

    #[test]
    fn what_is_missing_or_unknown_is_said() {
        for (error, why) in [
            (parse_disk("readonly=on").unwrap_err(), "path=FILE"),
            (parse_disk("socket=/s").unwrap_err(), "vhost_user=on"),
            (parse_disk("vhost_user=on").unwrap_err(), "socket=PATH"),
            (
                parse_disk("vhost_user=on,socket=/s,path=/d").unwrap_err(),
                "has the image",
            ),
            (
                parse_disk("vhost_user=on,socket=/s,readonly=on").unwrap_err(),
                "has the image",
            ),
            (parse_disk("/d.img").unwrap_err(), "is path=/d.img meant?"),
            (parse_disk("").unwrap_err(), "not NAME=VALUE"),
            (parse_disk("path=").unwrap_err(), "path= is empty"),
            (parse_net("tap0").unwrap_err(), "is tap=tap0 meant?"),
            (parse_vsock("/s").unwrap_err(), "is socket=/s meant?"),
            (parse_balloon("1G").unwrap_err(), "is size=1G meant?"),
            (parse_console("stdio").unwrap_err(), "null, or file:PATH"),
            (parse_console("pty").unwrap_err(), "null, or file:PATH"),
            (
                parse_disk(&format!("vhost_user=on,socket=/{}", "x".repeat(107))).unwrap_err(),
                "107 bytes",
            ),
            (parse_disk("path=/d,direct=on").unwrap_err(), "direct"),
            (parse_disk("path=/d,bw_burst=1").unwrap_err(), "bw_burst"),
            (
                parse_disk("path=/d,bw_refill_time=1s").unwrap_err(),
                "milliseconds",
            ),
            (parse_net("tap=t,ops_size=many").unwrap_err(), "no size"),
            (parse_disk("path=/d,readonly=yes").unwrap_err(), "on or off"),
            (parse_net("mac=52:54:00:12:34:56").unwrap_err(), "one tap"),
            (parse_net("tap=t,fd=3").unwrap_err(), "one tap"),
            (parse_net("tap=t,mac=1").unwrap_err(), "52:54:00:12:34:56"),
            (parse_net("fd=x").unwrap_err(), "fd=x"),
            (parse_vsock("cid=3").unwrap_err(), "socket=PATH"),
            (parse_balloon("size=lots").unwrap_err(), "no size"),
        ] {
            assert!(error.contains(why), "{error}");
        }
    }
}
