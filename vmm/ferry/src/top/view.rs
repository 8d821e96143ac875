//! The view: boxes on a terminal, or the same figures as plain text.

use std::collections::VecDeque;
use std::path::PathBuf;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline};

use super::figures::{Figures, float};
use super::sample::Sample;

/// Maximum number of samples in the sparkline of dirty pages.
const HISTORY: usize = 200;

/// What is drawn of one monitor.
pub(super) struct View {
    socket: PathBuf,
    figures: Figures,
    /// Dirty pages per second, the latest first.
    history: VecDeque<u64>,
    /// Error of the last attempt to take a sample, if it failed.
    lost: Option<String>,
}

impl View {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            figures: Figures::default(),
            history: VecDeque::new(),
            lost: None,
        }
    }

    /// Adds the next sample.
    pub(super) fn push(&mut self, sample: Sample) {
        self.lost = None;
        if self.figures.push(sample) {
            self.history
                .push_front(rounded(self.figures.dirty().total()));
            self.history.truncate(HISTORY);
        }
    }

    /// Marks the figures as outdated because no sample could be taken.
    pub(super) fn lose(&mut self, why: &str) {
        self.lost = Some(why.to_owned());
    }

    /// Draws all boxes on a terminal.
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let rows = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(9),
            Constraint::Min(4),
            Constraint::Length(6),
            Constraint::Length(1),
        ]);
        let [head, memory, devices, migration, foot] = rows.areas(frame.area());
        let halves = Layout::horizontal([Constraint::Percentage(55), Constraint::Percentage(45)]);
        let [memory, vcpus] = halves.areas(memory);
        frame.render_widget(Line::from(self.headline()).reversed(), head);
        self.draw_memory(frame, memory);
        draw_box(frame, vcpus, " vCPUs ", &self.figures.vcpu_lines());
        draw_box(frame, devices, " Devices ", &self.figures.device_lines());
        self.draw_migration(frame, migration);
        let foot_line = match &self.lost {
            Some(why) => Line::from(format!("q quits; {why}")).red(),
            None => Line::from("q or Ctrl-C quits; the guest runs on").dim(),
        };
        frame.render_widget(foot_line, foot);
    }

    fn draw_memory(&self, frame: &mut Frame<'_>, area: Rect) {
        let dirty = self.figures.dirty();
        let block = Block::bordered().title(format!(" Dirty pages per second{} ", dirty.note));
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let rows = Layout::vertical([Constraint::Min(6), Constraint::Length(1)]);
        let [table, history] = rows.areas(inner);
        let lines: Vec<Line<'_>> = dirty.lines().into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines), table);
        // The latest sample is on the right. The width limits the number of samples.
        let room = usize::from(history.width);
        let mut data: Vec<u64> = self.history.iter().take(room).copied().collect();
        data.reverse();
        let sparkline = Sparkline::default().data(data).style(Style::new().green());
        frame.render_widget(sparkline, history);
    }

    fn draw_migration(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" Migration ");
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let [bar, text] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(inner);
        let lines: Vec<Line<'_>> = self
            .figures
            .migration_lines()
            .into_iter()
            .map(Line::from)
            .collect();
        match self
            .figures
            .progress()
            .filter(|progress| progress.phase.is_active())
        {
            Some(progress) => {
                let gauge = Gauge::default()
                    .ratio(share(progress.round_pages_sent, progress.round_pages))
                    .label(format!("round {}", progress.rounds.len() + 1));
                frame.render_widget(gauge, bar);
                frame.render_widget(Paragraph::new(lines), text);
            }
            None => frame.render_widget(Paragraph::new(lines), inner),
        }
    }

    /// Returns the same figures as plain text.
    pub(super) fn text(&self) -> String {
        let dirty = self.figures.dirty();
        let mut text = format!("{}\n", self.headline().trim());
        for (title, lines) in [
            (
                format!("dirty pages per second{}", dirty.note),
                dirty.lines(),
            ),
            ("vCPUs".to_owned(), self.figures.vcpu_lines()),
            ("devices".to_owned(), self.figures.device_lines()),
            ("migration".to_owned(), self.figures.migration_lines()),
        ] {
            text += &format!("\n{title}\n");
            lines.iter().for_each(|line| text += &format!("  {line}\n"));
        }
        text
    }

    fn headline(&self) -> String {
        let seen = match self.lost {
            Some(_) => "last seen: ",
            None => "",
        };
        let guest = self.figures.headline();
        format!(" ferry top  {}  {seen}{guest}", self.socket.display())
    }
}

/// Draws a box with lines of text. If the box is too small, the last line tells how many lines are missing.
fn draw_box(frame: &mut Frame<'_>, area: Rect, title: &str, lines: &[String]) {
    let block = Block::bordered().title(title);
    let room = usize::from(block.inner(area).height);
    let mut shown: Vec<Line<'_>> = lines
        .iter()
        .take(room)
        .map(|l| Line::from(l.as_str()))
        .collect();
    if lines.len() > room
        && let Some(last) = shown.last_mut()
    {
        *last = Line::from(format!("… and {} more", lines.len() - room + 1)).dim();
    }
    frame.render_widget(Paragraph::new(shown).block(block), area);
}

/// Returns `part / whole`, limited to 0 to 1.
fn share(part: u64, whole: u64) -> f64 {
    (float(part) / float(whole.max(1))).clamp(0.0, 1.0)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are at least 0 and far below 2^64"
)]
fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::sample::Counters;
    use super::*;
    use migration::{Phase, Report, Round};
    use vmm::config::{CpusConfig, VmConfig};
    use vmm::monitor::{DirtyRate, VmInfo, VmState};

    /// A sample in which every counter has the value `count`, or a multiple of it.
    fn sample(at: Instant, cpus: u32, count: u64) -> Sample {
        let mut config = VmConfig::from_json(br#"{"payload":{"kernel":"/k"}}"#).unwrap();
        config.cpus = CpusConfig::of(cpus);
        let mut counters = Counters::new();
        for cpu in 0..cpus {
            let of = [("stall_us", count * u64::from(cpu)), ("stops", count)];
            counters.insert(format!("vcpu{cpu}"), named(&of));
        }
        counters.insert("_serial".to_owned(), named(&[("lost", count)]));
        counters.insert(
            "tracker".to_owned(),
            named(&[("dirtied_by_vcpu_pages", count)]),
        );
        Sample {
            at,
            info: Some(VmInfo {
                config,
                state: VmState::Running,
                memory_actual_size: 512 << 20,
            }),
            counters,
            progress: Report::default(),
            dirty_rate: None,
        }
    }

    fn named(counters: &[(&str, u64)]) -> BTreeMap<String, u64> {
        counters
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect()
    }

    /// A view with two samples, two seconds apart, between which each counter grew by 200,000.
    fn view_of(cpus: u32) -> View {
        let began = Instant::now();
        let mut view = View::new("/run/guest.sock".into());
        view.push(sample(began, cpus, 0));
        view.push(sample(began + Duration::from_secs(2), cpus, 200_000));
        view
    }

    fn screen(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_guest_fits_80_by_24() {
        let shown = screen(&view_of(4), 80, 24);
        for expected in [
            "/run/guest.sock  Running, 4 vCPUs, 512 MiB",
            "vcpu              100000       390.6 MiB/s",
            // The vCPU stalled for 0.6 s of 2 s.
            "vcpu3    30.0 %      600.0  200000",
            "_serial     lost                              200000        100000/s",
            "q or Ctrl-C quits",
        ] {
            assert!(shown.contains(expected), "no {expected:?} in:\n{shown}");
        }
    }

    #[test]
    fn vcpus_that_stall_most_are_shown_first_and_missing_lines_are_counted() {
        let shown = screen(&view_of(32), 80, 24);
        assert!(
            shown.contains("vcpu31 ") && !shown.contains("vcpu3 "),
            "{shown}"
        );
        assert!(shown.contains("… and 27 more"), "{shown}");
    }

    #[test]
    fn a_measured_rate_and_a_migration_are_drawn_and_printed() {
        let mut view = view_of(1);
        let mut next = sample(Instant::now() + Duration::from_secs(4), 1, 200_000);
        next.dirty_rate = Some(DirtyRate {
            interval_ms: 1000.0,
            pages: 256,
            pages_per_s: 256.0,
            bytes_per_s: 1_048_576.0,
            sources: BTreeMap::from([("vcpu".to_owned(), 256.0)]),
        });
        next.progress = Report {
            phase: Phase::Rounds,
            url: Some("unix:/there".to_owned()),
            rounds: vec![Round::default(); 2],
            round_pages: 100,
            round_pages_sent: 50,
            bytes_sent: 3 << 20,
            message: Some("will not converge".to_owned()),
            ..Report::default()
        };
        view.push(next);
        for shown in [screen(&view, 80, 24), view.text()] {
            for expected in [
                "vcpu                 256         1.0 MiB/s",
                "rounds  unix:/there",
                "2 rounds, 3 MiB sent",
                "will not converge",
            ] {
                assert!(shown.contains(expected), "no {expected:?} in:\n{shown}");
            }
        }
        assert!(screen(&view, 80, 24).contains("round 3"));
    }

    #[test]
    fn the_latest_samples_are_drawn_when_there_are_more_than_fit() {
        let began = Instant::now();
        let mut view = View::new("/run/guest.sock".into());
        // Pages are dirtied only at the end.
        for second in 0..100 {
            let count = if second < 98 { 0 } else { second * 1000 };
            view.push(sample(began + Duration::from_secs(second), 1, count));
        }
        assert!(screen(&view, 80, 24).contains('█'));
    }

    #[test]
    fn figures_of_a_lost_monitor_are_marked_as_outdated() {
        let mut view = view_of(1);
        view.lose("no monitor answers");
        let shown = screen(&view, 80, 24);
        assert!(shown.contains("last seen: Running"), "{shown}");
        assert!(shown.contains("q quits; no monitor answers"), "{shown}");
        view.push(sample(Instant::now(), 1, 0));
        assert!(!screen(&view, 80, 24).contains("last seen"));
    }

    #[test]
    fn no_sample_and_any_terminal_size_are_drawn() {
        let mut view = View::new("/run/guest.sock".into());
        view.lose("no monitor answers");
        for (width, height) in [(1, 1), (10, 3), (80, 24), (300, 100)] {
            screen(&view, width, height);
            screen(&view_of(64), width, height);
        }
        assert!(screen(&view, 80, 24).contains("no monitor answers"));
        assert!(view.text().contains("no guest"));
    }
}
