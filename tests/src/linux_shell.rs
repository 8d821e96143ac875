//! A stock Linux guest at its shell, which is asked by typing.

use std::time::{Duration, Instant};

use crate::ferry::Ferry;
use crate::linux_guest::{LOAD_BUTTON, READY};
use crate::machine::Machine;

/// A guest of an emulated host boots in about ten seconds; a busy machine needs more.
pub const BOOT_LIMIT: Duration = Duration::from_secs(100);
/// How long the answer to a question may take.
pub const SHELL_LIMIT: Duration = Duration::from_secs(30);

const MIB_KIB: u32 = 1024;
const PROMPT: &str = "/ # ";

/// A guest at its shell.
#[derive(Debug)]
pub struct LinuxShell {
    /// Its monitor.
    pub ferry: Ferry,
    cpus: u32,
    memory_mib: u32,
}

impl LinuxShell {
    /// Boots a guest and waits for its shell; what fails, panics.
    ///
    /// # Panics
    /// No monitor, no shell.
    #[must_use]
    pub fn boot(machine: &Machine, options: &[&str]) -> Self {
        Self::of(Ferry::run_with(machine, options).unwrap(), machine)
    }

    /// The guest that `ferry` boots, which was told to make `machine`; waits for its shell.
    ///
    /// # Panics
    /// It does not come.
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

    /// Waits for the shell in the output behind `mark`.
    ///
    /// # Panics
    /// It does not come.
    pub fn is_ready(&self, mark: usize) {
        let serial = self.ferry.serial();
        serial.wait_after(mark, READY, BOOT_LIMIT).unwrap();
        serial.wait_after(mark, PROMPT, SHELL_LIMIT).unwrap();
    }

    /// Types a command and waits for what only the guest can have computed, and for the next prompt: what is typed while
    /// the shell takes its terminal back can get lost.
    ///
    /// # Panics
    /// It does not come.
    pub fn ask(&mut self, command: &str, answer: &str) {
        self.ask_patiently(command, answer, SHELL_LIMIT);
    }

    /// As [`Self::ask`], for what takes longer.
    ///
    /// # Panics
    /// It does not come.
    pub fn ask_patiently(&mut self, command: &str, answer: &str, limit: Duration) {
        let mark = self.answers(command, answer, limit);
        let serial = self.ferry.serial();
        serial.wait_after(mark, PROMPT, limit).unwrap();
    }

    /// Types a command and waits for the answer alone. Returns where the output behind the command begins.
    fn answers(&mut self, command: &str, answer: &str, limit: Duration) -> usize {
        let mark = self.ferry.serial().mark();
        self.ferry.type_in(&format!("{command}\n")).unwrap();
        let serial = self.ferry.serial();
        serial.wait_after(mark, answer, limit).unwrap();
        mark
    }

    /// The numbers that `command` prints.
    ///
    /// # Panics
    /// None within the time of a question, or what is no number.
    pub fn numbers(&mut self, command: &str) -> Vec<u64> {
        let mark = self.ferry.serial().mark();
        let line = format!("echo \"numbers: \"$({command})\" end\"");
        // The end comes after the answer: the echo of what was typed has it, too.
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

    /// A counter of a device, as `ferry ctl counters` tells it.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn counter(&self, device: &str, name: &str) -> u64 {
        let counters = self.ferry.ctl_json(&["counters"]).unwrap();
        let value = counters[device][name].as_u64();
        value.unwrap_or_else(|| panic!("no {device} {name}: {counters}"))
    }

    /// Waits until a counter of a device is `least` or more.
    ///
    /// # Panics
    /// It does not become so.
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

    /// The guest counts what it was given. Of its memory the kernel keeps a part for itself: less than 64 MiB and
    /// a sixteenth.
    ///
    /// # Panics
    /// It counts something else.
    pub fn sees_its_cpus_and_memory(&mut self) {
        self.ask(
            "echo cpus: $(nproc), $(grep -c ^processor /proc/cpuinfo)",
            &format!("\ncpus: {0}, {0}", self.cpus),
        );
        // One package, and a core for each.
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

    /// Each vCPU ran something, and takes interrupts of its own timer.
    ///
    /// # Panics
    /// One does not.
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

    /// A daemon in the guest hears of the button, and runs `command`, which switches the guest off.
    ///
    /// # Panics
    /// It is not heard, or not obeyed.
    pub fn obeys_its_power_button(mut self, command: &str) {
        self.ask(LOAD_BUTTON, "/ # ");
        self.ask(
            &format!(
                "mkdir -p /etc/acpi/PWRF; echo '{command}' > /etc/acpi/PWRF/00000080; \
                 chmod +x /etc/acpi/PWRF/00000080; acpid -d &"
            ),
            "/ # ",
        );
        // A button that nobody listens to is not heard.
        self.ask(
            "until ls -l /proc/$(pidof acpid)/fd | grep -q event0; do sleep 1; done; echo acpid: $?",
            "\nacpid: 0",
        );
        self.ferry.ctl(&["power-button"]).unwrap();
        self.ends();
    }

    /// Runs `command`, which switches the guest off.
    ///
    /// # Panics
    /// It does not.
    pub fn switches_itself_off(mut self, command: &str) {
        self.answers(command, "reboot: Power down", SHELL_LIMIT);
        self.ends();
    }

    /// Waits for the end of the guest and of its monitor.
    ///
    /// # Panics
    /// It does not end, or not well.
    pub fn ends(mut self) {
        let ended = self.ferry.wait(SHELL_LIMIT).unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
}
