//! `ferry top` on a pseudo-terminal: its screen, its keys, and that it restores the terminal. Runs on every KVM host.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use ferry_tests::console::Console;
use ferry_tests::dirtier::{self, LIMIT, assert_runs, audit};
use ferry_tests::{paths, process};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// Control sequences of xterm that switch to the alternate screen and back (mode 1049) and show the cursor (mode 25).
const OTHER_SCREEN: &str = "\u{1b}[?1049h";
const OWN_SCREEN: &str = "\u{1b}[?1049l";
const CURSOR: &str = "\u{1b}[?25h";
const CLEAR: &str = "\u{1b}[2J";

/// Pseudo-terminal. `person` is the side of the user, `terminal` the side of the programs.
struct Terminal {
    person: File,
    terminal: File,
    screen: Console,
}

impl Terminal {
    fn new(rows: u16, columns: u16) -> Self {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        let person = File::from(person);
        let screen = Console::follow(person.try_clone().unwrap());
        let new = Self {
            person,
            terminal: terminal.into(),
            screen,
        };
        new.becomes(rows, columns);
        new
    }

    /// Changes the size of the terminal. Returns a mark in the output before the change.
    fn becomes(&self, rows: u16, columns: u16) -> usize {
        let mark = self.screen.mark();
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(self.person.as_fd(), size).unwrap();
        mark
    }

    fn modes(&self) -> Termios {
        tcgetattr(self.terminal.as_fd()).unwrap()
    }

    fn type_in(&self, keys: &str) {
        io::Write::write_all(&mut &self.person, keys.as_bytes()).unwrap();
    }

    /// Starts `ferry top` and waits for its first screen.
    fn watch(&self, socket: &Path) -> Child {
        let mark = self.screen.mark();
        let stdio = || Stdio::from(self.terminal.try_clone().unwrap());
        // setsid makes the pseudo-terminal the controlling terminal of a new session.
        let top = Command::new("setsid")
            .arg("--ctty")
            .arg(paths::ferry().unwrap())
            .args(["top", "--interval-ms", "200", "--api-socket"])
            .arg(socket)
            .env("TERM", "xterm-256color")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        for drawn in [OTHER_SCREEN, "ferry top", "vCPUs", "Devices", "q or Ctrl-C"] {
            self.screen.wait_after(mark, drawn, LIMIT).unwrap();
        }
        top
    }

    /// Asserts that `ferry top` ends and restores the terminal.
    fn is_left(&self, mut top: Child, mark: usize, before: &Termios) {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match top.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    top.kill().unwrap();
                    panic!("top does not end: {:?}", self.screen.text_after(mark));
                }
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        assert!(status.success(), "{status}");
        for left in [OWN_SCREEN, CURSOR] {
            self.screen.wait_after(mark, left, LIMIT).unwrap();
        }
        assert_same(&self.modes(), before);
    }
}

fn assert_same(now: &Termios, before: &Termios) {
    let modes = |of: &Termios| {
        let text = format!("{of:?}");
        (
            of.input_modes,
            of.output_modes,
            of.control_modes,
            of.local_modes,
            text,
        )
    };
    assert_eq!(modes(now), modes(before));
}

/// Returns the lowest row to which the output moves the cursor.
fn lowest_row(drawn: &str) -> u16 {
    let sequences = drawn.split("\u{1b}[").skip(1);
    let rows = sequences.filter_map(|sequence| {
        let (row, rest) = sequence.split_once(';')?;
        let columns = rest.find('H')?;
        rest[..columns].parse::<u16>().ok()?;
        row.parse().ok()
    });
    rows.max().unwrap_or_default()
}

#[test]
fn top_draws_follows_the_terminals_size_and_leaves_it_as_it_was() {
    let mut ferry = dirtier::start(2);
    let socket = ferry.api_socket();
    let terminal = Terminal::new(24, 80);
    let before = terminal.modes();
    assert!(
        before
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO)
    );

    let mark = terminal.screen.mark();
    let top = terminal.watch(&socket);
    // The terminal is in raw mode: keys arrive one by one and are not echoed.
    assert!(
        !terminal
            .modes()
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO)
    );
    // The screen shows the guest: it has two vCPUs and dirties memory all the time.
    for drawn in ["Running, 2 vCPUs, 128 MiB", "vcpu0", "vcpu1", "_serial"] {
        terminal.screen.wait_after(mark, drawn, LIMIT).unwrap();
    }
    assert_eq!(lowest_row(&terminal.screen.text_after(mark)), 24);

    let resized = terminal.becomes(40, 120);
    terminal
        .screen
        .wait_after(resized, "q or Ctrl-C", LIMIT)
        .unwrap();
    assert_eq!(lowest_row(&terminal.screen.text_after(resized)), 40);

    // If the terminal is too small, the view draws as much as fits.
    let resized = terminal.becomes(3, 10);
    terminal
        .screen
        .wait_after(resized, "Devices", LIMIT)
        .unwrap();
    // Output for the old size ends with the clearing of the screen.
    let drawn = terminal.screen.text_after(resized);
    let (_, drawn) = drawn.rsplit_once(CLEAR).unwrap();
    assert!(lowest_row(drawn) <= 3, "{drawn:?}");
    // An unknown key does not end the view.
    terminal.type_in("x");
    let resized = terminal.becomes(24, 80);
    terminal
        .screen
        .wait_after(resized, "q or Ctrl-C", LIMIT)
        .unwrap();
    let asked = terminal.screen.mark();
    terminal.type_in("q");
    terminal.is_left(top, asked, &before);

    // In raw mode, Control-C is a key like any other. SIGTERM ends the view, too.
    let top = terminal.watch(&socket);
    let asked = terminal.screen.mark();
    terminal.type_in("\u{3}");
    terminal.is_left(top, asked, &before);
    let top = terminal.watch(&socket);
    let asked = terminal.screen.mark();
    process::terminate(top.id()).unwrap();
    terminal.is_left(top, asked, &before);

    assert_runs(&mut ferry);
    audit(&mut ferry);
}

#[test]
fn top_says_that_the_monitor_is_gone_and_still_listens() {
    let mut ferry = dirtier::start(1);
    let terminal = Terminal::new(24, 80);
    let before = terminal.modes();
    let top = terminal.watch(&ferry.api_socket());
    let mark = terminal.screen.mark();
    ferry.kill();
    terminal.screen.wait_after(mark, "q quits;", LIMIT).unwrap();
    terminal.type_in("q");
    terminal.is_left(top, mark, &before);
}
