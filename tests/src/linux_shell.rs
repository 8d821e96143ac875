//! Controls a stock Linux guest by typing commands at its shell on the serial port.

use std::time::{Duration, Instant};

use crate::ferry::Ferry;
use crate::linux_guest::{LOAD_BUTTON, READY};
use crate::machine::Machine;

/// Time limit for a boot. A guest boots in about ten seconds in the lab, and takes longer on a busy machine.
pub const BOOT_LIMIT: Duration = Duration::from_secs(100);
/// Time limit for the answer to a command.
pub const SHELL_LIMIT: Duration = Duration::from_secs(30);

const MIB_KIB: u32 = 1024;
const PROMPT: &str = "/ # ";

/// Guest that runs its shell.
#[derive(Debug)]
pub struct LinuxShell {
    /// Monitor of the guest.
    pub ferry: Ferry,
    cpus: u32,
    memory_mib: u32,
}

impl LinuxShell {
    /// Boots a guest and waits for its shell.
    ///
    /// # Panics
    /// Panics if the monitor does not start or the shell does not appear.
    #[must_use]
    pub fn boot(machine: &Machine, options: &[&str]) -> Self {
        Self::of(Ferry::run_with(machine, options).unwrap(), machine)
    }

    /// Waits for the shell of the guest that `ferry` boots. `machine` is the configuration that it was given.
    ///
    /// # Panics
    /// Panics if it does not appear in time.
    #[must_use]
    pub fn of(ferry: Ferry, machine: &Machine) -> Self {
        let shell = Self {
            ferry,
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
        };
        shell.is_ready(0);
        shell
    }

    /// Waits for the shell in the output after `mark`.
    ///
    /// # Panics
    /// Panics if it does not appear in time.
    pub fn is_ready(&self, mark: usize) {
        let serial = self.ferry.serial();
        serial.wait_after(mark, READY, BOOT_LIMIT).unwrap();
        serial.wait_after(mark, PROMPT, SHELL_LIMIT).unwrap();
    }

    /// Types a command and waits for an answer that only the guest can have computed, and then for the next prompt.
    /// Input can get lost while the shell takes its terminal back.
    ///
    /// # Panics
    /// Panics if it does not appear in time.
    pub fn ask(&mut self, command: &str, answer: &str) {
        self.ask_patiently(command, answer, SHELL_LIMIT);
    }

    /// Like [`Self::ask`], with a longer time limit.
    ///
    /// # Panics
    /// Panics if it does not appear in time.
    pub fn ask_patiently(&mut self, command: &str, answer: &str, limit: Duration) {
        let mark = self.answers(command, answer, limit);
        let serial = self.ferry.serial();
        serial.wait_after(mark, PROMPT, limit).unwrap();
    }

    /// Types a command and waits for the answer, but not for a prompt. Returns a mark where its output begins.
    fn answers(&mut self, command: &str, answer: &str, limit: Duration) -> usize {
        let mark = self.ferry.serial().mark();
        self.ferry.type_in(&format!("{command}\n")).unwrap();
        let serial = self.ferry.serial();
        serial.wait_after(mark, answer, limit).unwrap();
        mark
    }

    /// Runs `command` and returns the numbers that it prints.
    ///
    /// # Panics
    /// Panics if no answer arrives in time, or if a word is not a number.
    pub fn numbers(&mut self, command: &str) -> Vec<u64> {
        let mark = self.ferry.serial().mark();
        let line = format!("echo \"numbers: \"$({command})\" end\"");
        // The end mark must come after the answer, because the echo of the command contains the mark, too.
        self.ask(&line, "\nnumbers: ");
        let deadline = Instant::now() + SHELL_LIMIT;
        loop {
            let text = self.ferry.serial().text_after(mark);
            let answer = text.split_once("\nnumbers: ").map(|(_, rest)| rest);
            if let Some((numbers, _)) = answer.and_then(|rest| rest.split_once(" end\n")) {
                let numbers = numbers.split_whitespace().map(str::parse);
                return numbers.collect::<Result<_, _>>().unwrap();
            }
            assert!(Instant::now() < deadline, "{command}: {text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns a counter of a device from `ferry ctl counters`.
    ///
    /// # Panics
    /// Panics if there is no such counter.
    #[must_use]
    pub fn counter(&self, device: &str, name: &str) -> u64 {
        let counters = self.ferry.ctl_json(&["counters"]).unwrap();
        let value = counters[device][name].as_u64();
        value.unwrap_or_else(|| panic!("no {device} {name}: {counters}"))
    }

    /// Waits until a counter of a device is at least `least`.
    ///
    /// # Panics
    /// Panics if it does not get there in time.
    pub fn counts(&self, device: &str, name: &str, least: u64) {
        let deadline = Instant::now() + SHELL_LIMIT;
        loop {
            let value = self.counter(device, name);
            if value >= least {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{device} {name}: {value} of {least}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Asserts that the guest sees the vCPUs and the memory of its configuration. The kernel reserves less than 64 MiB
    /// and a sixteenth of the memory for itself.
    ///
    /// # Panics
    /// Panics if it sees other numbers.
    pub fn sees_its_cpus_and_memory(&mut self) {
        self.ask(
            "echo cpus: $(nproc), $(grep -c ^processor /proc/cpuinfo)",
            &format!("\ncpus: {0}, {0}", self.cpus),
        );
        // One package with one core for each vCPU.
        self.ask(
            "awk -F: '/^physical id/ { p[$2] = 1 } /^cpu cores/ { c = $2 } \
             END { for (i in p) n++; print \"topology:\", n, c + 0 }' /proc/cpuinfo",
            &format!("\ntopology: 1 {}", self.cpus),
        );
        let most = self.memory_mib * MIB_KIB;
        let least = most - most / 16 - 64 * MIB_KIB;
        self.ask(
            &format!(
                "awk '/^MemTotal/ {{ print \"memory right:\", ({least} < $2 && $2 < {most}) }}' \
                 /proc/meminfo"
            ),
            "\nmemory right: 1",
        );
    }

    /// Asserts that each vCPU runs processes and takes interrupts of its local timer.
    ///
    /// # Panics
    /// Panics if a vCPU does not.
    pub fn uses_every_cpu(&mut self) {
        self.ask(
            "for cpu in $(seq 0 $(($(nproc) - 1))); do taskset -c $cpu sh -c ':' && echo on $cpu; done \
             | wc -l | sed 's/^/ran on: /'",
            &format!("\nran on: {}", self.cpus),
        );
        self.ask(
            "awk '/LOC:/ { for (n = 0, i = 2; i <= NF; i++) n += $i ~ /^[1-9]/; print \"timers:\", n }' \
             /proc/interrupts",
            &format!("\ntimers: {}", self.cpus),
        );
    }

    /// Presses the power button. A daemon in the guest receives the event and runs `command`, which powers the guest
    /// off.
    ///
    /// # Panics
    /// Panics if the guest does not receive the event or does not power off.
    pub fn obeys_its_power_button(mut self, command: &str) {
        self.ask(LOAD_BUTTON, "/ # ");
        self.ask(
            &format!(
                "mkdir -p /etc/acpi/PWRF; echo '{command}' > /etc/acpi/PWRF/00000080; \
                 chmod +x /etc/acpi/PWRF/00000080; acpid -d &"
            ),
            "/ # ",
        );
        // The guest misses the event if the daemon does not listen yet.
        self.ask(
            "until ls -l /proc/$(pidof acpid)/fd | grep -q event0; do sleep 1; done; echo acpid: $?",
            "\nacpid: 0",
        );
        self.ferry.ctl(&["power-button"]).unwrap();
        self.ends();
    }

    /// Runs `command`, which powers the guest off.
    ///
    /// # Panics
    /// Panics if it does not power off.
    pub fn switches_itself_off(mut self, command: &str) {
        self.answers(command, "reboot: Power down", SHELL_LIMIT);
        self.ends();
    }

    /// Waits for the guest and its monitor to end.
    ///
    /// # Panics
    /// Panics if the monitor does not end with status 0.
    pub fn ends(mut self) {
        let ended = self.ferry.wait(SHELL_LIMIT).unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
}
