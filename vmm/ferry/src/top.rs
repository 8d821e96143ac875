//! `ferry top`: a live view of a running guest.
//!
//! A thread of its own takes the samples, so that a slow monitor does not block drawing or key presses.

mod figures;
mod sample;
mod view;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::arguments::TopArguments;
use super::{Failure, print_line};
use sample::{Logging, Sample, Sampler};
use view::View;
use vmm::api::ClientError;

/// Maximum time that the view waits for a key before it draws again.
const KEY_WAIT: Duration = Duration::from_millis(50);

/// Shows the guest until the user quits, or prints one sample. Returns the exit status.
pub(super) fn top(arguments: &TopArguments) -> Result<u8, Failure> {
    let sampler = Sampler {
        socket: arguments.api_socket.clone(),
        interval: Duration::from_millis(arguments.interval_ms),
        logging: match arguments.no_dirty_rate {
            true => Logging::Off,
            false => Logging::On,
        },
    };
    if arguments.once {
        return print_once(&sampler);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(
            "top: standard input and output must be a terminal; use --once to print one sample as text".into(),
        );
    }
    // Before the terminal changes its mode, so that an error is printed as usual.
    let first = sampler.sample_now()?;
    show(sampler, first)
}

/// Prints the figures of one interval.
fn print_once(sampler: &Sampler) -> Result<u8, Failure> {
    let mut view = View::new(sampler.socket.clone());
    view.push(sampler.sample_now()?);
    view.push(sampler.sample_interval()?);
    print_line(view.text().trim_end())?;
    Ok(0)
}

/// Draws on the terminal until the user quits or a signal arrives. [`Screen`] restores the terminal, and so does the panic
/// hook of ratatui.
fn show(sampler: Sampler, first: Sample) -> Result<u8, Failure> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ended))?;
    }
    let mut view = View::new(sampler.socket.clone());
    view.push(first);
    let samples = start_sampling(sampler)?;
    let mut terminal = Screen(ratatui::try_init()?);
    while !ended.load(Ordering::Relaxed) {
        terminal.0.draw(|frame| view.draw(frame))?;
        if quit_is_pressed()? {
            break;
        }
        for sample in samples.try_iter() {
            match sample {
                Ok(sample) => view.push(sample),
                Err(error) => view.lose(&error.to_string()),
            }
        }
    }
    Ok(0)
}

/// The terminal while the view draws on it. Dropping it restores the terminal.
struct Screen(DefaultTerminal);

impl Drop for Screen {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _gone = ratatui::try_restore();
    }
}

/// Starts a thread that takes samples until the receiver is dropped.
fn start_sampling(sampler: Sampler) -> io::Result<Receiver<Result<Sample, ClientError>>> {
    let (sender, samples) = channel();
    thread::Builder::new()
        .name("_sampler".into())
        .spawn(move || while sender.send(sampler.sample_interval()).is_ok() {})?;
    Ok(samples)
}

/// Waits at most [`KEY_WAIT`] for a key. Returns true if it quits the view.
fn quit_is_pressed() -> io::Result<bool> {
    if !event::poll(KEY_WAIT)? {
        return Ok(false);
    }
    match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press => Ok(quits(key)),
        _ => Ok(false),
    }
}

fn quits(key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    matches!(
        (key.code, control),
        (KeyCode::Char('q') | KeyCode::Esc, false) | (KeyCode::Char('c'), true)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_escape_and_control_c_quit() {
        let key = |code, modifiers| quits(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!key(KeyCode::Char('x'), KeyModifiers::NONE));
    }
}
