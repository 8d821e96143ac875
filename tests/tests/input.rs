//! Bad input: each error message names the offending value, nothing panics, and no file or process is left behind.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use ferry_tests::api::{self, Answer};
use ferry_tests::dirtier::{self, LIMIT, PATIENT, assert_ends, assert_runs, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::{self, Ferry};
use ferry_tests::frames::Tag;
use ferry_tests::paths;
use ferry_tests::process::{self, Apart, Ended};
use ferry_tests::proxy::{Action, Direction, Fault, Proxy, Trigger};

/// Asserts that `ferry` refuses these arguments with a message that contains these words, and does not panic.
fn assert_refused(ended: &Ended, named: &str) {
    let text = &ended.stderr;
    assert!(!ended.status.success(), "{ended:?}");
    assert!(text.contains(named), "no {named:?} in: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

fn invoke(arguments: &[&str]) -> Ended {
    ferry::invoke(arguments, LIMIT).unwrap()
}

fn hello() -> String {
    paths::guest("hello.elf").unwrap().display().to_string()
}

/// Returns the arguments of `ferry run` with a valid kernel and these options.
fn run(options: &[&str]) -> Ended {
    let kernel = hello();
    invoke(&[&["run", "--kernel", &kernel][..], options].concat())
}

#[test]
fn flags_of_run_out_of_range_are_named() {
    for (options, named) in [
        (&["--memory", "0"][..], "guest memory"),
        (&["--memory", "lots"], "--memory"),
        (&["--memory", "-1"], "-1"),
        (&["--memory", "4097"], "4097"),
        // Larger than any guest-physical address space.
        (&["--memory", "16777216G"], "guest memory"),
        // More devices than the limit.
        (&["--memory", "4T,hugepages=on"], "nr_hugepages"),
        (&["--memory", "64M,hugepages=maybe"], "hugepages=maybe"),
        (&["--memory", "64M,zones=on"], "zones=on"),
        (&["--memory", "64M,shared=off,hugepages=on"], "shared"),
        (&["--cpus", "0"], "--cpus"),
        (&["--cpus", "65"], "--cpus"),
        (&["--cpus", "two"], "--cpus"),
        (&["--serial", "pigeon"], "--serial"),
        (&["--serial", "file:/no/such/folder/x"], "/no/such/folder/x"),
        (&["--api-socket", ""], "--api-socket"),
        (&["--api-socket", "/no/such/folder/x"], "/no/such/folder/x"),
        (&["--dirty-log", "ring-of-fire"], "--dirty-log"),
        (&["--initramfs", "/no/such/initramfs"], "/no/such/initramfs"),
        (&["--disk", "/x"], "path=/x"),
        (&["--net", "tap0"], "tap=tap0"),
    ] {
        assert_refused(&run(options), named);
    }
    let long = "x".repeat(1 << 16);
    assert_refused(&run(&["--cmdline", &long]), "command line");
    assert_refused(&invoke(&["run"]), "--kernel");
    for options in [&[][..], &["--serial", "stdio"], &["--memory", "1G"]] {
        let ended = invoke(&[&["run"][..], options].concat());
        assert_refused(&ended, "--config FILE");
        assert_refused(&ended, "--api-socket");
    }
    let long = format!("/{}", "x".repeat(107));
    assert_refused(&run(&["--api-socket", &long]), "at most 107 bytes");
    assert_refused(&invoke(&["fly"]), "fly");
}

#[test]
fn devices_that_the_host_has_not_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    fs::write(&empty, [0; 511]).unwrap();
    let empty = format!("path={}", empty.display());
    let qcow2 = folder.path().join("qcow2");
    fs::write(&qcow2, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 1016]].concat()).unwrap();
    let qcow2 = format!("path={}", qcow2.display());
    let part = folder.path().join("part");
    fs::write(&part, [0; 1000]).unwrap();
    let part = format!("path={}", part.display());
    let other = format!("socket={}", folder.path().display());
    let long = format!("socket=/{}", "x".repeat(107));
    let back_end = format!("vhost_user=on,{long}");
    for (arguments, named) in [
        (["--disk", "path=/no/such/image"], "/no/such/image"),
        (["--disk", "path=/dev/null"], "a disk is a raw image"),
        (["--disk", &empty], "less than 512 bytes"),
        (["--disk", &qcow2], "qemu-img convert -O raw"),
        (["--disk", &part], "truncate -s %512"),
        (["--disk", &back_end], "at most 107 bytes"),
        (["--vsock", &other], "something else"),
        (["--vsock", &long], "at most 107 bytes"),
        (["--net", "tap=ferry-absent"], "ip tuntap add ferry-absent"),
        (["--net", "tap=lo"], "no tap"),
        (["--net", "fd=1000000"], "descriptor 1000000"),
        (["--vsock", "socket=/no/such/folder/x"], "/no/such/folder/x"),
        (["--vsock", "socket=/x,cid=2"], "vsock address 2"),
        (["--balloon", "size=64G"], "balloon.size"),
        (["--console", "file:/no/such/folder/x"], "/no/such/folder/x"),
        (["--console", "stdio"], "--console"),
    ] {
        assert_refused(&run(&arguments), named);
    }
}

#[test]
fn flags_of_receive_and_demo_out_of_range_are_named() {
    for (arguments, named) in [
        (&["receive"][..], "URL"),
        (&["receive", "pigeon"], "pigeon"),
        (&["receive", "tcp:127.0.0.1"], "tcp:127.0.0.1"),
        (&["receive", "tcp:127.0.0.1:99999"], "99999"),
        (&["receive", "unix:/no/such/folder/x"], "/no/such/folder/x"),
        (
            &["receive", "tcp:127.0.0.1:0", "--memory-limit", "x"],
            "--memory-limit",
        ),
        (
            &["receive", "tcp:127.0.0.1:0", "--serial", "pigeon"],
            "--serial",
        ),
        (
            &["receive", "tcp:127.0.0.1:0", "--console", "stdio"],
            "--console",
        ),
        (
            &[
                "receive",
                "tcp:127.0.0.1:0",
                "--disk",
                "path=/no/such/image",
            ],
            "/no/such/image",
        ),
        (
            &["receive", "tcp:127.0.0.1:0", "--disk", "path=/"],
            "Is a directory",
        ),
        (
            &["receive", "tcp:127.0.0.1:0", "--net", "tap=ferry-absent"],
            "ip tuntap add ferry-absent",
        ),
        (
            &["receive", "tcp:127.0.0.1:0", "--net", "tap=t,mtu=1"],
            "net[0].mtu",
        ),
        // Plain TCP to an address that is not loopback.
        (&["receive", "tcp:0.0.0.0:0"], "0.0.0.0"),
        (&["demo", "--memory", "0"], "--memory"),
        (&["demo", "--hot", "600M"], "--hot"),
        (&["demo", "--hot", "4097"], "--hot"),
        (&["demo", "--cold", "600M"], "--cold"),
        (&["demo", "--cpus", "0"], "--cpus"),
        (&["demo", "--cpus", "17"], "--cpus"),
        (&["demo", "--downtime-ms", "0"], "--downtime-ms"),
        (&["demo", "--transport", "pigeon"], "--transport"),
        (&["ctl", "info"], "--api-socket"),
        (
            &["ctl", "--api-socket", "/no/such/socket", "info"],
            "/no/such/socket",
        ),
    ] {
        assert_refused(&invoke(arguments), named);
    }
}

#[test]
fn flags_of_ctl_out_of_range_are_named_and_the_guest_runs_on() {
    let mut ferry = dirtier::start(1);
    let target = Endpoint::free_tcp().unwrap().to_string();
    for (options, named) in [
        (&["--downtime-ms", "0"][..], "downtime_ms"),
        (&["--downtime-ms", "3600001"], "downtime_ms"),
        (&["--downtime-ms", "soon"], "--downtime-ms"),
        (&["--timeout-s", "0"], "timeout_s"),
        (&["--timeout-s", "604801"], "timeout_s"),
        (&["--timeout-strategy", "hope"], "--timeout-strategy"),
        (&["--throttle-max", "100"], "throttle_max"),
        (&["--throttle-max", "-1"], "-1"),
    ] {
        let call = [&["send-migration", &target][..], options].concat();
        assert_refused(&ferry.try_ctl(&call, LIMIT).unwrap(), named);
    }
    for (call, named) in [
        (&["send-migration", "pigeon:x"][..], "pigeon:x"),
        (&["send-migration", "tcp:192.0.2.1:1"], "loopback"),
        (&["migration-resolve", "perhaps"], "perhaps"),
        (&["migration-resolve", "resume"], "nothing to resolve"),
        (&["cancel-migration"], "nothing to cancel"),
        (&["levitate"], "levitate"),
    ] {
        assert_refused(&ferry.try_ctl(call, LIMIT).unwrap(), named);
    }
    assert_runs(&mut ferry);
    audit(&mut ferry);
}

#[test]
fn a_kernel_that_is_not_there_or_no_kernel_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let no_kernel = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let mut damaged = fs::read(hello()).unwrap();
    damaged.truncate(100);
    let whole = folder.path().display().to_string();
    for kernel in [
        "/no/such/kernel".to_owned(),
        whole,
        no_kernel("poem", &b"no kernel, but as long as a header\n".repeat(100)),
        no_kernel("damaged", &damaged),
    ] {
        let ended = invoke(&["run", "--memory", "64M", "--kernel", &kernel]);
        assert_refused(&ended, &kernel);
    }
    let program = paths::ferry().unwrap().display().to_string();
    for (kernel, why) in [
        (no_kernel("empty", b""), "is empty"),
        (program, "an ELF image, but no kernel"),
    ] {
        let ended = invoke(&["run", "--memory", "64M", "--kernel", &kernel]);
        assert_refused(&ended, why);
    }
}

#[test]
fn a_configuration_is_refused_with_the_fields_path() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.json");
    let path = file.display().to_string();
    let payload = format!(r#""payload":{{"kernel":"{}"}}"#, hello());
    for (rest, named) in [
        (r#","fs":[]"#, "fs"),
        (
            r#","disks":[{"path":"/d","direct":true}]"#,
            "disks[0].direct",
        ),
        (r#","net":[{"tap":"t","mtu":1}]"#, "net[0].mtu"),
        (r#","memory":{"size":1,"zones":[]}"#, "memory.zones"),
        (r#","memory":{"size":-1}"#, "memory.size"),
        (r#","memory":{"size":0}"#, "guest memory"),
        (
            r#","cpus":{"boot_vcpus":1,"max_vcpus":2}"#,
            "cpus.max_vcpus",
        ),
        (r#","cpus":{"boot_vcpus":0,"max_vcpus":0}"#, "vCPU"),
        (r#","cpus":{"boot_vcpus":4096,"max_vcpus":4096}"#, "4096"),
        (r#","serial":{"mode":"Pigeon"}"#, "serial.mode"),
        (r#","serial":{"mode":"File"}"#, "serial.file"),
        (",", "guest.json"),
    ] {
        fs::write(&file, format!("{{{payload}{rest}}}")).unwrap();
        assert_refused(&invoke(&["run", "--config", &path]), named);
    }
    fs::write(&file, r#"{"payload":{}}"#).unwrap();
    assert_refused(&invoke(&["run", "--config", &path]), "payload.kernel");
    assert_refused(&invoke(&["run", "--config", "/no/such"]), "/no/such");
}

/// No process writes to the FIFO, so a monitor that opened it blockingly would hang.
#[test]
fn a_pipe_is_no_kernel_and_no_initramfs() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe").display().to_string();
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let refused = "pipe: not a regular file";
    assert_refused(&invoke(&["run", "--kernel", &pipe]), refused);
    assert_refused(&run(&["--initramfs", &pipe]), refused);
}

#[test]
fn a_failure_that_nobody_can_be_told_of_is_a_failure_and_no_panic() {
    let ferry = paths::ferry().unwrap();
    for arguments in [
        &["run", "--kernel", "/no/such/kernel"][..],
        &["demo", "--cpus", "1"],
    ] {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(&ferry);
        command.args(arguments).stdout(full()).stderr(full());
        assert_eq!(command.status().unwrap().code(), Some(1), "{arguments:?}");
    }
}

#[test]
fn a_socket_in_use_is_named_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    let owner = UnixListener::bind(&path).unwrap();
    let text = path.to_str().unwrap();
    assert_refused(&run(&["--api-socket", text]), text);
    let (migration, api) = (format!("unix:{text}"), folder.path().join("api"));
    let receive = ["receive", &migration, "--api-socket", api.to_str().unwrap()];
    assert_refused(&invoke(&receive), text);
    assert!(!api.exists(), "the other socket was left behind");
    assert!(path.exists(), "the owner's socket was removed");
    drop(owner);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "no socket").unwrap();
    assert_refused(&run(&["--api-socket", text]), text);
    assert_eq!(fs::read(&path).unwrap(), b"no socket");
}

#[test]
fn a_port_in_use_is_named() {
    let endpoint = Endpoint::free_tcp().unwrap();
    let owner = endpoint.listen().unwrap();
    let url = endpoint.to_string();
    assert_refused(&invoke(&["receive", &url]), &url);
    drop(owner);
}

/// Returns a command for `ferry` in a new mount namespace, after the shell commands in `prepare`.
fn without_kvm(prepare: &str, arguments: &[&str]) -> Ended {
    let ferry = paths::ferry().unwrap();
    let mut command = process::apart(&ferry, Apart::Mounts, prepare).unwrap();
    process::run(command.args(arguments), LIMIT).unwrap()
}

#[test]
fn without_a_usable_kvm_one_message_names_cause_and_remedy() {
    let kernel = hello();
    let verbs: [&[&str]; 3] = [
        &["demo"],
        &["run", "--kernel", &kernel],
        &["receive", "tcp:127.0.0.1:0"],
    ];
    for (prepare, cause) in [
        ("mount -t tmpfs tmpfs /dev", "does not exist"),
        ("mount -o bind /dev/null /dev/kvm", "is not the KVM device"),
    ] {
        for verb in verbs {
            let ended = without_kvm(prepare, verb);
            assert_refused(&ended, "ferry: /dev/kvm");
            let text = ended.stderr.trim_end();
            assert!(text.contains(cause), "no {cause:?} in: {text}");
            assert!(text.contains("load kvm_intel or kvm_amd"), "{text}");
            assert!(!text.contains('\n'), "more than one message: {text}");
        }
    }
}

/// API request to a running monitor.
fn call(ferry: &Ferry, method: &str, name: &str, body: &str) -> Answer {
    let path = format!("/api/v1/{name}");
    api::request(&ferry.api_socket(), method, &path, body).unwrap()
}

fn assert_answers(ferry: &Ferry, calls: &[(&str, &str, &str, u16, &str)]) {
    for (method, name, body, status, named) in calls {
        let answer = call(ferry, method, name, body);
        let said = format!("{method} {name} {body}: {answer:?}");
        assert_eq!(answer.status, *status, "{said}");
        assert!(answer.body.contains(named), "no {named:?}: {said}");
    }
}

/// Returns the body of `vm.send-migration` with these fields besides the destination.
fn wish(fields: &str) -> String {
    format!(r#"{{"destination_url":"unix:/no/such/socket",{fields}}}"#)
}

#[test]
fn calls_that_cannot_be_are_answered_with_the_reason_and_the_guest_runs_on() {
    let mut ferry = dirtier::start(1);
    assert_answers(
        &ferry,
        &[
            ("GET", "vmm.ping", "", 200, "version"),
            ("GET", "vm.info", "", 200, "Running"),
            ("GET", "vm.nothing", "", 404, "vm.nothing"),
            ("GET", "../v2/vm.info", "", 404, "vm.info"),
            ("PUT", "vm.snapshot", "{}", 501, "vm.snapshot"),
            ("PUT", "vm.create", "{}", 400, "payload"),
            (
                "PUT",
                "vm.create",
                r#"{"payload":{}}"#,
                409,
                "a guest already",
            ),
            ("PUT", "vm.boot", "", 405, "booted already"),
            ("GET", "vm.pause", "", 405, "GET"),
            ("PUT", "vmm.ping", "", 405, "PUT"),
            ("DELETE", "vm.info", "", 405, "DELETE"),
            ("PUT", "vm.cancel-migration", "", 409, "nothing to cancel"),
        ],
    );
    let outside = api::request(&ferry.api_socket(), "GET", "/", "").unwrap();
    assert_eq!(outside.status, 404, "{outside:?}");
    for (fields, named) in [
        (r#""zones":1"#, "zones"),
        (r#""downtime_ms":0"#, "downtime_ms"),
        (r#""downtime_ms":3600001"#, "downtime_ms"),
        (r#""downtime_ms":-1"#, "downtime_ms"),
        (r#""downtime_ms":"soon""#, "downtime_ms"),
        (r#""timeout_s":0"#, "timeout_s"),
        (r#""timeout_s":604801"#, "timeout_s"),
        (r#""timeout_strategy":"Hope""#, "timeout_strategy"),
        (r#""throttle_max":100"#, "throttle_max"),
        (r#""verify":"yes""#, "verify"),
    ] {
        let send = wish(fields);
        assert_answers(&ferry, &[("PUT", "vm.send-migration", &send, 400, named)]);
    }
    let send = |url: &str| format!(r#"{{"destination_url":"{url}"}}"#);
    for (body, named) in [
        (String::new(), "needs a JSON body"),
        ("{".to_owned(), "EOF"),
        ("[]".to_owned(), "expected an object"),
        ("{}".to_owned(), "destination_url"),
        (send("pigeon:x"), "pigeon:x"),
        (send("tcp:192.0.2.1:1"), "loopback"),
        (send(&format!("unix:/{}", "x".repeat(107))), "107 bytes"),
    ] {
        assert_answers(&ferry, &[("PUT", "vm.send-migration", &body, 400, named)]);
    }
    let nobody = send("unix:/no/such/socket");
    assert_answers(
        &ferry,
        &[
            ("PUT", "vm.send-migration", &nobody, 500, "`ferry receive`"),
            ("PUT", "vm.dirty-rate", "", 200, "pages_per_s"),
            (
                "PUT",
                "vm.resize",
                r#"{"desired_balloon":"1G"}"#,
                400,
                "bytes",
            ),
        ],
    );
    let resolve = "vm.migration-resolve";
    assert_answers(
        &ferry,
        &[
            ("PUT", resolve, r#"{"action":"perhaps"}"#, 400, "action"),
            ("PUT", resolve, r#"{"action":"resume","why":1}"#, 400, "why"),
            (
                "PUT",
                resolve,
                r#"{"action":"resume"}"#,
                409,
                "nothing to resolve",
            ),
        ],
    );
    assert_runs(&mut ferry);
    audit(&mut ferry);
}

#[test]
fn a_destination_without_a_guest_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(folder.path().join("migration"));
    let mut ferry = Ferry::receive(&endpoint).unwrap();
    assert_eq!(ferry.phase().unwrap(), "listening");
    assert_answers(
        &ferry,
        &[
            ("GET", "vm.info", "", 404, "no guest"),
            ("PUT", "vm.pause", "", 404, "no guest"),
            ("PUT", "vm.resume", "", 404, "no guest"),
            ("PUT", "vm.boot", "", 404, "no guest"),
            (
                "PUT",
                "vm.create",
                r#"{"payload":{}}"#,
                409,
                "another one sends",
            ),
            (
                "PUT",
                "vm.send-migration",
                &wish(r#""verify":true"#),
                404,
                "no guest",
            ),
        ],
    );
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
    assert_gone(&folder.path().join("migration"));
}

#[test]
fn a_destination_that_had_its_guest_says_so() {
    let mut source = dirtier::start(1);
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut destination = Ferry::receive(&endpoint).unwrap();
    source.send_migration(&endpoint, &PATIENT).unwrap();
    assert_ends(&mut source);
    let create = ("PUT", "vm.create", r#"{"payload":{}}"#, 409, "has had it");
    assert_answers(
        &destination,
        &[
            create,
            ("PUT", "vm.shutdown", "", 204, ""),
            create,
            ("PUT", "vm.delete", "", 204, ""),
            create,
        ],
    );
    destination.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut destination);
}

fn assert_gone(path: &Path) {
    assert!(!path.exists(), "left behind: {}", path.display());
}

#[test]
fn what_a_migration_forbids_is_refused_with_its_phase() {
    let mut source = dirtier::start(2);
    let endpoint = Endpoint::free_tcp().unwrap();
    let _destination = Ferry::receive(&endpoint).unwrap();
    let hold = Fault {
        direction: Direction::ToSource,
        trigger: Trigger::Frame(Tag::RoundAck, 0),
        action: Action::Stall,
    };
    let any_port = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let proxy = Proxy::start(&any_port, endpoint, vec![hold]).unwrap();
    let target = proxy.endpoint().to_string();
    let answer = std::thread::scope(|scope| {
        let sending = scope.spawn(|| source.try_ctl(&["send-migration", &target], LIMIT));
        assert!(proxy.wait_fired(1, LIMIT));
        let other = wish(r#""verify":true"#);
        assert_answers(
            &source,
            &[
                ("PUT", "vm.pause", "", 409, "rounds"),
                ("PUT", "vm.resume", "", 409, "rounds"),
                ("PUT", "vm.shutdown", "", 409, "rounds"),
                ("PUT", "vm.delete", "", 409, "rounds"),
                ("PUT", "vm.boot", "", 409, "rounds"),
                ("PUT", "vm.dirty-rate", "{}", 409, "rounds"),
                ("PUT", "vmm.shutdown", "", 409, "rounds"),
                ("PUT", "vm.send-migration", &other, 409, "rounds"),
                (
                    "PUT",
                    "vm.migration-resolve",
                    r#"{"action":"discard"}"#,
                    409,
                    "rounds",
                ),
                (
                    "GET",
                    "vm.migration-progress",
                    "",
                    200,
                    r#""phase":"rounds""#,
                ),
                ("PUT", "vm.cancel-migration", "", 204, ""),
            ],
        );
        proxy.resume();
        sending.join().unwrap().unwrap()
    });
    assert!(!answer.status.success(), "{answer:?}");
    assert_runs(&mut source);
    audit(&mut source);
}
