//! `ferry top`: a view of a running guest that is looked at again and again.
//!
//! A thread looks, this one draws and listens to keys: a monitor that answers slowly does not make the view deaf.

mod look;
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
use super::{Failure, say};
use look::{Look, Watcher};
use view::View;
use vmm::api::ClientError;

/// How long a key may wait at most.
const KEY_WAIT: Duration = Duration::from_millis(50);

pub(super) fn top(arguments: &TopArguments) -> Result<u8, Failure> {
    let watcher = Watcher {
        socket: arguments.api_socket.clone(),
        interval: Duration::from_millis(arguments.interval_ms),
        measures: !arguments.no_dirty_rate,
    };
    if arguments.once {
        return once(&watcher);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(
            "top: standard input and output are no terminal; --once prints one look as text".into(),
        );
    }
    // What cannot be looked at at all is told before the terminal is taken.
    let first = watcher.glance()?;
    watch(watcher, first)
}

fn once(watcher: &Watcher) -> Result<u8, Failure> {
    let mut view = View::new(watcher.socket.clone());
    view.see(watcher.glance()?);
    view.see(watcher.look()?);
    say(view.text().trim_end())?;
    Ok(0)
}

/// Draws until a key or a signal ends it. The terminal is as it was afterwards, whatever happens: ratatui's panic hook
/// restores it as well.
fn watch(watcher: Watcher, first: Look) -> Result<u8, Failure> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ended))?;
    }
    let mut view = View::new(watcher.socket.clone());
    view.see(first);
    let looks = look_on(watcher)?;
    let mut terminal = Screen(ratatui::try_init()?);
    while !ended.load(Ordering::Relaxed) {
        terminal.0.draw(|frame| view.draw(frame))?;
        if asks_for_end()? {
            break;
        }
        for seen in looks.try_iter() {
            match seen {
                Ok(look) => view.see(look),
                Err(error) => view.lose(&error.to_string()),
            }
        }
    }
    Ok(0)
}

/// The terminal as the view has it, until it is dropped.
struct Screen(DefaultTerminal);

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that has gone cannot be restored.
        let _gone = ratatui::try_restore();
    }
}

/// Looks from a thread of its own, for as long as somebody sees it.
fn look_on(watcher: Watcher) -> io::Result<Receiver<Result<Look, ClientError>>> {
    let (sender, looks) = channel();
    thread::Builder::new()
        .name("_look".into())
        .spawn(move || while sender.send(watcher.look()).is_ok() {})?;
    Ok(looks)
}

/// Waits a moment for a key.
fn asks_for_end() -> io::Result<bool> {
    if !event::poll(KEY_WAIT)? {
        return Ok(false);
    }
    match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press => Ok(is_end(key)),
        _ => Ok(false),
    }
}

fn is_end(key: KeyEvent) -> bool {
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
    fn q_escape_and_control_c_end_it() {
        let key = |code, modifiers| is_end(KeyEvent::new(code, modifiers));
        assert!(key(KeyCode::Char('q'), KeyModifiers::NONE));
        assert!(key(KeyCode::Esc, KeyModifiers::NONE));
        assert!(key(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!key(KeyCode::Char('c'), KeyModifiers::NONE));
        assert!(!key(KeyCode::Char('x'), KeyModifiers::NONE));
    }
}
