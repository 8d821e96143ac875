//! Third-party clients control a guest: the crate cloud-hypervisor-client, curl and `ferry ctl`, while `ferry top`
//! watches.

use std::fs;
use std::path::Path;
use std::process::Command;

use cloud_hypervisor_client::apis::{DefaultApi, Error};
use cloud_hypervisor_client::models::{
    ConsoleMode, CpusConfig, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig,
    VmResize, VmState,
};
use cloud_hypervisor_client::socket_based_api_client;
use ferry_tests::dirtier::{LIMIT, assert_ends, audit};
use ferry_tests::ferry::Ferry;
use ferry_tests::{dirtier, ferry, process};

use super::{READY, config, kernel};

fn status(error: &Error) -> u16 {
    match error {
        Error::Api(answer) => answer.code.as_u16(),
        other => panic!("{other}"),
    }
}

fn body(error: &Error) -> &str {
    match error {
        Error::Api(answer) => &answer.body,
        other => panic!("{other}"),
    }
}

#[test]
fn the_client_of_cloud_hypervisor_drives_a_guest_through_its_life() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut ferry = Ferry::empty(&[]).unwrap();
    runtime.block_on(drive(&mut ferry));
    assert_ends(&mut ferry);
}

fn clients_config() -> VmConfig {
    let payload = PayloadConfig {
        kernel: Some(kernel("dirtier.elf")),
        cmdline: Some("cpus=2 memory=48M cold=44M serial=on".to_owned()),
        ..PayloadConfig::new()
    };
    VmConfig {
        cpus: Some(CpusConfig::new(2, 2)),
        memory: Some(MemoryConfig::new(128 << 20)),
        serial: Some(SerialConfig::new(ConsoleMode::Tty)),
        ..VmConfig::new(payload)
    }
}

async fn drive(ferry: &mut Ferry) {
    let client = socket_based_api_client(ferry.api_socket());
    assert_eq!(
        client.vmm_ping_get().await.unwrap().pid,
        Some(i64::from(ferry.pid()))
    );
    assert_eq!(status(&client.vm_info_get().await.unwrap_err()), 404);
    assert_eq!(status(&client.boot_vm().await.unwrap_err()), 404);
    let unsupported = VmConfig {
        disks: Some(vec![DiskConfig::default()]),
        serial: Some(SerialConfig::new(ConsoleMode::Pty)),
        ..clients_config()
    };
    assert_eq!(
        status(&client.create_vm(unsupported).await.unwrap_err()),
        400
    );
    client.create_vm(clients_config()).await.unwrap();
    let again = client.create_vm(clients_config()).await.unwrap_err();
    assert_eq!(status(&again), 409, "{again}");
    let info = client.vm_info_get().await.unwrap();
    assert_eq!(info.state, VmState::Created);
    assert_eq!(info.config.cpus.unwrap().boot_vcpus, 2);
    assert_eq!(status(&client.pause_vm().await.unwrap_err()), 405);

    client.boot_vm().await.unwrap();
    ferry.serial().wait_for(READY, LIMIT).unwrap();
    let info = client.vm_info_get().await.unwrap();
    assert_eq!(
        (info.state, info.memory_actual_size),
        (VmState::Running, Some(128 << 20))
    );
    dirtier::assert_runs(ferry);

    client.pause_vm().await.unwrap();
    assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Paused);
    let counters = client.vm_counters_get().await.unwrap();
    assert!(counters["vcpu1"]["stops"] >= 1, "{counters:?}");
    // The monitor wrote the kernel into guest memory.
    assert!(
        counters["tracker"]["dirtied_by_monitor_pages"] > 0,
        "{counters:?}"
    );
    client.resume_vm().await.unwrap();
    dirtier::assert_runs(ferry);

    client.shutdown_vm().await.unwrap();
    assert_eq!(client.vm_info_get().await.unwrap().state, VmState::Shutdown);
    assert_eq!(status(&client.shutdown_vm().await.unwrap_err()), 405);
    let mark = ferry.serial().mark();
    client.boot_vm().await.unwrap();
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
    let mark = ferry.serial().mark();
    client.reboot_vm().await.unwrap();
    ferry.serial().wait_after(mark, READY, LIMIT).unwrap();
    client.power_button_vm().await.unwrap();
    let unknown = client.vm_resize_disk_put(Default::default()).await;
    let unknown = unknown.unwrap_err();
    assert_eq!(status(&unknown), 501);
    assert!(body(&unknown).contains("vm.resize-disk"), "{unknown}");
    let no_balloon = client.vm_resize_put(VmResize {
        desired_balloon: Some(0),
        ..VmResize::new()
    });
    let no_balloon = no_balloon.await.unwrap_err();
    assert_eq!(status(&no_balloon), 400);
    assert!(body(&no_balloon).contains("has no balloon"), "{no_balloon}");
    client.delete_vm().await.unwrap();
    assert_eq!(status(&client.vm_info_get().await.unwrap_err()), 404);
    client.shutdown_vmm().await.unwrap();
}

/// Sends a request by curl. Returns the status and the body of the response.
fn curl(socket: &Path, method: &str, name: &str, body: &str) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--max-time",
        "60",
        "--unix-socket",
    ]);
    command.arg(socket);
    command.args(["--request", method, "--write-out", "\n%{http_code}"]);
    if !body.is_empty() {
        command.args(["--header", "Content-Type: application/json", "--data", body]);
    }
    command.arg(format!("http://localhost/api/v1/{name}"));
    let ended = process::run(&mut command, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let (body, status) = ended.stdout.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn curl_drives_a_guest_through_its_life() {
    let mut ferry = Ferry::empty(&[]).unwrap();
    let socket = ferry.api_socket();
    let config = config(1).to_string();
    for (method, name, body, status, named) in [
        ("GET", "vmm.ping", "", 200, "\"version\""),
        ("PUT", "vm.create", config.as_str(), 204, ""),
        ("GET", "vm.info", "", 200, "\"Created\""),
        ("PUT", "vm.boot", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Running\""),
        ("PUT", "vm.pause", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Paused\""),
        ("PUT", "vm.resume", "", 204, ""),
        ("GET", "vm.counters", "", 200, "\"vcpu0\""),
        (
            "PUT",
            "vm.dirty-rate",
            "{\"interval_ms\":50}",
            200,
            "\"pages_per_s\"",
        ),
        ("PUT", "vm.shutdown", "", 204, ""),
        ("GET", "vm.info", "", 200, "\"Shutdown\""),
        ("PUT", "vm.delete", "", 204, ""),
        ("GET", "vm.info", "", 404, "no guest"),
        ("PUT", "vm.add-disk", "{}", 501, "vm.add-disk"),
        ("PUT", "vmm.shutdown", "", 204, ""),
    ] {
        let (found, text) = curl(&socket, method, name, body);
        assert_eq!(found, status, "{method} {name}: {text}");
        assert!(text.contains(named), "{method} {name}: {text}");
    }
    assert_ends(&mut ferry);
}

#[test]
fn ctl_drives_a_guest_through_its_life() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.json");
    fs::write(&file, config(1).to_string()).unwrap();
    let mut ferry = Ferry::empty(&[]).unwrap();
    ferry.ctl(&["create", file.to_str().unwrap()]).unwrap();
    ferry.ctl(&["boot"]).unwrap();
    ferry.serial().wait_for(READY, LIMIT).unwrap();
    let counters = ferry.ctl_json(&["counters"]).unwrap();
    assert!(counters["vcpu0"]["stops"].is_u64(), "{counters}");
    ferry.ctl(&["shutdown"]).unwrap();
    assert_eq!(ferry.ctl_json(&["info"]).unwrap()["state"], "Shutdown");
    ferry.ctl(&["delete"]).unwrap();
    let refused = dirtier::refusal(ferry.ctl(&["info"]).unwrap_err());
    assert!(refused.contains("no guest"), "{refused}");
    let missing = ferry.try_ctl(&["create", "/no/such/file"], LIMIT).unwrap();
    assert!(
        !missing.status.success() && missing.stderr.contains("/no/such/file"),
        "{missing:?}"
    );
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}

#[test]
fn top_prints_one_look_and_refuses_to_draw_without_a_terminal() {
    let mut ferry = dirtier::start(2);
    let socket = ferry.api_socket().display().to_string();
    let top = |options: &[&str]| {
        let arguments = [&["top", "--api-socket", &socket][..], options].concat();
        ferry::invoke(&arguments, LIMIT).unwrap()
    };
    // Long enough for a vCPU to run in it even on a busy machine.
    let seen = top(&["--once", "--interval-ms", "1000"]);
    assert!(seen.status.success(), "{seen:?}");
    assert!(
        seen.stdout.contains("Running, 2 vCPUs, 128 MiB"),
        "{seen:?}"
    );
    let vcpu = seen
        .stdout
        .lines()
        .find_map(|line| line.trim().strip_prefix("vcpu "));
    let rate: u64 = vcpu
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(rate > 0, "{seen:?}");
    assert!(!seen.stdout.contains('\u{1b}'), "{seen:?}");
    let refused = top(&[]);
    assert!(
        !refused.status.success() && refused.stderr.contains("--once"),
        "{refused:?}"
    );
    audit(&mut ferry);
    let gone = top(&["--once"]);
    assert!(
        !gone.status.success() && gone.stderr.contains(&socket),
        "{gone:?}"
    );
}
