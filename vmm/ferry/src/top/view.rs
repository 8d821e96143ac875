//! What is shown of the looks: boxes on a terminal, or the same as plain text.

use std::collections::VecDeque;
use std::path::PathBuf;

use ept::{PAGE_SIZE, Source};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline};

use super::look::{Counters, Look};
use migration::{Phase, Report};
use vmm::monitor::source_name;

/// Looks whose dirty pages are drawn side by side.
const HISTORY: usize = 200;
const MIB: f64 = 1024.0 * 1024.0;

/// All that was seen so far.
pub(super) struct View {
    socket: PathBuf,
    now: Option<Look>,
    before: Option<Look>,
    /// Dirty pages a second, the latest first.
    history: VecDeque<u64>,
    /// Why nothing is seen any more.
    lost: Option<String>,
}

/// Who dirties how many pages a second.
struct Dirty {
    sources: Vec<(&'static str, f64)>,
    /// Where the figures come from, if not from a measurement.
    note: &'static str,
}

impl View {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            now: None,
            before: None,
            history: VecDeque::new(),
            lost: None,
        }
    }

    /// Takes the next look in.
    pub(super) fn see(&mut self, look: Look) {
        self.before = self.now.replace(look);
        self.lost = None;
        if self.before.is_some() {
            self.history.push_front(rounded(self.dirty().total()));
            self.history.truncate(HISTORY);
        }
    }

    /// The monitor could not be looked at.
    pub(super) fn lose(&mut self, why: &str) {
        self.lost = Some(why.to_owned());
    }

    /// Draws it all.
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
        draw_box(frame, vcpus, " vCPUs ", &self.vcpu_lines());
        draw_box(frame, devices, " Devices ", &self.device_lines());
        self.draw_migration(frame, migration);
        let foot_line = match &self.lost {
            Some(why) => Line::from(format!("q quits; {why}")).red(),
            None => Line::from("q or Ctrl-C quits; the guest runs on").dim(),
        };
        frame.render_widget(foot_line, foot);
    }

    fn draw_memory(&self, frame: &mut Frame<'_>, area: Rect) {
        let dirty = self.dirty();
        let block = Block::bordered().title(format!(" Dirty pages a second{} ", dirty.note));
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let rows = Layout::vertical([Constraint::Min(6), Constraint::Length(1)]);
        let [table, history] = rows.areas(inner);
        let lines: Vec<Line<'_>> = dirty.lines().into_iter().map(Line::from).collect();
        frame.render_widget(Paragraph::new(lines), table);
        // The latest on the right, as far back as there is room.
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
        let lines: Vec<Line<'_>> = self.migration_lines().into_iter().map(Line::from).collect();
        match self
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

    /// The same without a terminal.
    pub(super) fn text(&self) -> String {
        let dirty = self.dirty();
        let mut text = format!("{}\n", self.headline().trim());
        for (title, lines) in [
            (format!("dirty pages a second{}", dirty.note), dirty.lines()),
            ("vCPUs".to_owned(), self.vcpu_lines()),
            ("devices".to_owned(), self.device_lines()),
            ("migration".to_owned(), self.migration_lines()),
        ] {
            text += &format!("\n{title}\n");
            lines.iter().for_each(|line| text += &format!("  {line}\n"));
        }
        text
    }

    fn headline(&self) -> String {
        let guest = match self.now.as_ref().and_then(|look| look.info.as_ref()) {
            None => "no guest".to_owned(),
            Some(info) => format!(
                "{:?}, {} vCPUs, {:.0} MiB",
                info.state,
                info.config.cpus.boot_vcpus,
                float(info.memory_actual_size) / MIB
            ),
        };
        let seen = match self.lost {
            Some(_) => "last seen: ",
            None => "",
        };
        format!(" ferry top  {}  {seen}{guest}", self.socket.display())
    }

    fn progress(&self) -> Option<&Report> {
        self.now.as_ref().map(|look| &look.progress)
    }

    fn counters(&self) -> Option<&Counters> {
        self.now.as_ref().map(|look| &look.counters)
    }

    /// Seconds between the last two looks.
    fn seconds(&self) -> Option<f64> {
        let (now, before) = (self.now.as_ref()?, self.before.as_ref()?);
        Some(now.at.duration_since(before.at).as_secs_f64()).filter(|seconds| *seconds > 0.0)
    }

    /// How much a counter grew in each second between the last two looks. A guest that was booted anew counts from 0.
    fn growth(&self, component: &str, counter: &str) -> Option<f64> {
        let of = |look: &Look| look.counters.get(component)?.get(counter).copied();
        let (now, before) = (of(self.now.as_ref()?)?, of(self.before.as_ref()?)?);
        Some(float(now.checked_sub(before)?) / self.seconds()?)
    }

    fn dirty(&self) -> Dirty {
        let measured = self.now.as_ref().and_then(|look| look.dirty_rate.as_ref());
        let active = self
            .progress()
            .is_some_and(|progress| progress.phase.is_active());
        let rate = |name: &str| match measured {
            Some(rate) => rate.sources.get(name).copied(),
            None => self.growth("tracker", &format!("dirtied_by_{name}_pages")),
        };
        let sources = Source::ALL
            .into_iter()
            .map(|source| source_name(source))
            .map(|name| (name, rate(name).unwrap_or_default()));
        let note = match (measured, active) {
            (Some(_), _) => "",
            (None, true) => " (migration log)",
            (None, false) => " (vCPUs not logged)",
        };
        Dirty {
            sources: sources.collect(),
            note,
        }
    }

    fn vcpu_lines(&self) -> Vec<String> {
        let mut vcpus: Vec<(u32, f64, u64, u64)> = self
            .counters()
            .into_iter()
            .flatten()
            .filter_map(|(name, counters)| {
                let index = name.strip_prefix("vcpu")?.parse().ok()?;
                let held = self.growth(name, "stall_us").unwrap_or_default() / 1e6;
                let counter = |of: &str| counters.get(of).copied().unwrap_or_default();
                Some((index, held, counter("stall_us"), counter("stops")))
            })
            .collect();
        // Those that stand most come first: there may be more than there is room for.
        vcpus.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if vcpus.is_empty() {
            return vec!["off".to_owned()];
        }
        let mut lines = vec![format!(
            "{:<8}{:>7}{:>11}{:>8}",
            "", "held", "stall ms", "stops"
        )];
        lines.extend(vcpus.into_iter().map(|(index, held, stall_us, stops)| {
            let name = format!("vcpu{index}");
            let percent = held.min(1.0) * 100.0;
            let stall_ms = float(stall_us) / 1e3;
            format!("{name:<8}{percent:>5.1} %{stall_ms:>11.1}{stops:>8}")
        }));
        lines
    }

    fn device_lines(&self) -> Vec<String> {
        let devices = self.counters().into_iter().flatten();
        let counters = devices
            .filter(|(name, _)| name.starts_with('_'))
            .flat_map(|(device, counters)| counters.iter().map(move |of| (device, of)));
        let lines: Vec<String> = counters
            .map(|(device, (counter, value))| {
                let per_s = self.growth(device, counter).unwrap_or_default();
                format!("{device:<12}{counter:<24}{value:>16}{per_s:>14.0}/s")
            })
            .collect();
        match lines.is_empty() {
            true => vec!["none".to_owned()],
            false => lines,
        }
    }

    fn migration_lines(&self) -> Vec<String> {
        let Some(progress) = self
            .progress()
            .filter(|progress| progress.phase != Phase::None)
        else {
            return vec!["none".to_owned()];
        };
        let phase = format!("{:?}", progress.phase).to_lowercase();
        let url = progress.url.as_deref().unwrap_or_default();
        let mut lines = vec![
            format!("{phase}  {url}"),
            format!(
                "{} rounds, {:.0} MiB sent, {:.1} s, vCPUs held {} %, downtime {:.1} ms",
                progress.rounds.len(),
                float(progress.bytes_sent) / MIB,
                progress.total_ms / 1e3,
                progress.throttle_percent,
                progress.downtime_ms,
            ),
        ];
        lines.extend(progress.message.clone());
        lines
    }
}

impl Dirty {
    fn total(&self) -> f64 {
        self.sources.iter().map(|(_, rate)| rate).sum()
    }

    fn lines(&self) -> Vec<String> {
        let all = [("all", self.total())];
        let rows = self.sources.iter().chain(&all);
        rows.map(|(name, rate)| {
            let mib = rate * float(PAGE_SIZE) / MIB;
            format!("{name:<12}{rate:>12.0}{mib:>12.1} MiB/s")
        })
        .collect()
    }
}

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

fn share(part: u64, whole: u64) -> f64 {
    (float(part) / float(whole.max(1))).clamp(0.0, 1.0)
}

/// Counts are far below 2^52, where floating point is exact.
#[allow(clippy::cast_precision_loss)]
fn float(count: u64) -> f64 {
    count as f64
}

/// Rates are at least 0 and far below 2^64.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use migration::Round;
    use vmm::config::{CpusConfig, VmConfig};
    use vmm::monitor::{DirtyRate, VmInfo, VmState};

    fn look(at: Instant, cpus: u32, count: u64) -> Look {
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
        Look {
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

    /// Two looks, two seconds apart, between which each counter grew by 200,000.
    fn seen(cpus: u32) -> View {
        let began = Instant::now();
        let mut view = View::new("/run/guest.sock".into());
        view.see(look(began, cpus, 0));
        view.see(look(began + Duration::from_secs(2), cpus, 200_000));
        view
    }

    fn screen(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_guest_fits_80_by_24() {
        let shown = screen(&seen(4), 80, 24);
        for expected in [
            "/run/guest.sock  Running, 4 vCPUs, 512 MiB",
            "vcpu              100000       390.6 MiB/s",
            // 0.6 of 2 seconds.
            "vcpu3    30.0 %      600.0  200000",
            "_serial     lost                              200000        100000/s",
            "q or Ctrl-C quits",
        ] {
            assert!(shown.contains(expected), "no {expected:?} in:\n{shown}");
        }
    }

    #[test]
    fn more_vcpus_than_lines_are_counted_and_those_that_stand_most_are_shown() {
        let shown = screen(&seen(32), 80, 24);
        assert!(
            shown.contains("vcpu31 ") && !shown.contains("vcpu3 "),
            "{shown}"
        );
        assert!(shown.contains("… and 27 more"), "{shown}");
    }

    #[test]
    fn a_measured_rate_and_a_migration_are_shown_and_said_in_text() {
        let mut view = seen(1);
        let mut next = look(Instant::now() + Duration::from_secs(4), 1, 200_000);
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
        view.see(next);
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
    fn the_latest_looks_are_drawn_when_there_are_more_than_fit() {
        let began = Instant::now();
        let mut view = View::new("/run/guest.sock".into());
        // Nothing is dirtied for long, and then something.
        for second in 0..100 {
            let count = if second < 98 { 0 } else { second * 1000 };
            view.see(look(began + Duration::from_secs(second), 1, count));
        }
        assert!(screen(&view, 80, 24).contains('█'));
    }

    #[test]
    fn what_was_lost_is_said_to_be_old() {
        let mut view = seen(1);
        view.lose("no monitor answers");
        let shown = screen(&view, 80, 24);
        assert!(shown.contains("last seen: Running"), "{shown}");
        assert!(shown.contains("q quits; no monitor answers"), "{shown}");
        view.see(look(Instant::now(), 1, 0));
        assert!(!screen(&view, 80, 24).contains("last seen"));
    }

    #[test]
    fn nothing_seen_and_any_size_are_no_trouble() {
        let mut view = View::new("/run/guest.sock".into());
        view.lose("no monitor answers");
        for (width, height) in [(1, 1), (10, 3), (80, 24), (300, 100)] {
            screen(&view, width, height);
            screen(&seen(64), width, height);
        }
        assert!(screen(&view, 80, 24).contains("no monitor answers"));
        assert!(view.text().contains("no guest"));
    }
}
