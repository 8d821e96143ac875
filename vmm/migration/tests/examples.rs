//! The examples of the crate do what they say.

#[path = "../examples/embed.rs"]
mod embed;

#[path = "../examples/kvm.rs"]
#[cfg(target_arch = "x86_64")]
mod kvm;

#[test]
fn the_embedded_monitor_migrates_its_guest() {
    embed::main().unwrap();
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_kvm_monitor_migrates_its_guest() {
    kvm::main().unwrap();
}
