//! The tree of snapshots, and one snapshot.

use super::{COLUMNS, Look, count, duration, plain, short, size, state_word, with_doing};
use anstyle::Style;
use machine::request::{Pending, SnapshotView, TreeView, Undo, View};
use machine::tree::{Config, Firmware, SnapshotId, SnapshotState};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Columns of indentation that a drawing may have; deeper lines show the nearest branches only.
const DEEPEST: usize = 24;

/// Columns that a line's figures take at most: "23 Nov 23:40  mem 1.2G  disk 1.2G".
const FIGURES: usize = 36;

/// A line before the columns are known.
struct Line {
    branch: String,
    name: String,
    figures: Figures,
    /// Whether it lies on the way from a root to Now: these lines decide where the figures stand.
    way: bool,
}

/// What stands behind a name.
enum Figures {
    Snapshot { date: String, memory: String, disk: String, mark: &'static str },
    Now(String),
}

/// The tree, with Now. `doing` is what is under way beside the state.
pub(crate) fn tree(view: &TreeView, doing: &[String], look: &Look) -> String {
    let lines = lines(view, look);
    // The figures stand right of the names on the way to Now; longer names on other branches push their own line's.
    let widest =
        lines.iter().filter(|line| line.way).map(|line| width(&line.branch) + width(&line.name)).max().unwrap_or(0);
    let column = (widest + 2).min(COLUMNS - FIGURES);
    let memories = lines.iter().filter_map(|line| match &line.figures {
        Figures::Snapshot { memory, .. } => Some(memory.len()),
        Figures::Now(_) => None,
    });
    let memories = memories.max().unwrap_or(0);
    let mut out = head(view, doing, column, look);
    for line in &lines {
        let figures = match &line.figures {
            Figures::Snapshot { date, memory, disk, mark } => format!("{date}  {memory:memories$}  disk {disk}{mark}"),
            Figures::Now(text) => text.clone(),
        };
        let room = COLUMNS.saturating_sub(width(&line.branch) + 2 + width(&figures)).max(8);
        let name = look.cut(&line.name, room);
        let gap = " ".repeat(column.saturating_sub(width(&line.branch) + width(&name)).max(2));
        let name = if matches!(line.figures, Figures::Now(_)) { look.paint(&name, Style::new().bold()) } else { name };
        writeln!(out, "{}{name}{gap}{figures}", line.branch).expect("writing to a string never fails");
    }
    out
}

/// The machine's name and state, the state above the figures' last column.
fn head(view: &TreeView, doing: &[String], column: usize, look: &Look) -> String {
    let place = (column + 26).min(COLUMNS - 20);
    let name = look.cut(&plain(&view.vm), place - 2);
    let gap = " ".repeat(place.saturating_sub(width(&name)).max(2));
    format!("{name}{gap}{}\n", with_doing(view.now.state, doing, look))
}

/// The lines, each parent before its children, siblings by time, Now last among them.
fn lines(view: &TreeView, look: &Look) -> Vec<Line> {
    let known: BTreeSet<SnapshotId> = view.snapshots.iter().map(|snapshot| snapshot.id).collect();
    let mut children: BTreeMap<Option<SnapshotId>, Vec<&SnapshotView>> = BTreeMap::new();
    for snapshot in &view.snapshots {
        children.entry(snapshot.parent.filter(|parent| known.contains(parent))).or_default().push(snapshot);
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
    }
    let way = way_to_now(view);
    let now_parent = view.now.parent.filter(|parent| known.contains(parent));
    // What hangs below a parent, Now last: (snapshot or Now, whether it is the last).
    let below = |parent: Option<SnapshotId>| {
        let snapshots = children.get(&parent).into_iter().flatten().map(|snapshot| Some(*snapshot));
        let all: Vec<Option<&SnapshotView>> = snapshots.chain((parent == now_parent).then_some(None)).collect();
        let last = all.len().saturating_sub(1);
        all.into_iter().enumerate().map(move |(i, child)| (child, i == last))
    };
    let mut out = Vec::with_capacity(view.snapshots.len() + 1);
    // An explicit stack, for a chain may be thousands deep; what was pushed last is drawn next.
    let mut stack: Vec<_> = below(None).rev().map(|(child, last)| (child, Indent::default(), last)).collect();
    while let Some((child, indent, last)) = stack.pop() {
        let branch = indent.branch(last, look);
        let Some(snapshot) = child else {
            out.push(Line { branch, name: "Now".to_owned(), figures: Figures::Now(now(view)), way: true });
            continue;
        };
        let figures = figures(snapshot, look);
        out.push(Line { branch, name: plain(&snapshot.name), figures, way: way.contains(&snapshot.id) });
        let indent = indent.below(last, look);
        stack.extend(below(Some(snapshot.id)).rev().map(|(child, last)| (child, indent.clone(), last)));
    }
    out
}

/// The snapshots between a root and Now.
fn way_to_now(view: &TreeView) -> BTreeSet<SnapshotId> {
    let parents: BTreeMap<SnapshotId, Option<SnapshotId>> = view.snapshots.iter().map(|s| (s.id, s.parent)).collect();
    let mut way = BTreeSet::new();
    let mut at = view.now.parent;
    while let Some(id) = at {
        if !way.insert(id) {
            break;
        }
        at = parents.get(&id).copied().flatten();
    }
    way
}

/// What stands behind Now.
fn now(view: &TreeView) -> String {
    let bytes = size(view.now.disk_bytes);
    match (view.now.parent, view.now.changed) {
        (None, _) => format!("disk {bytes}, no snapshot yet"),
        (Some(_), true) => format!("changed since: {bytes}"),
        (Some(_), false) => "unchanged since".to_owned(),
    }
}

/// What stands behind a snapshot.
fn figures(snapshot: &SnapshotView, look: &Look) -> Figures {
    let memory = if snapshot.memory {
        format!("mem {}", size(snapshot.memory_bytes))
    } else {
        state_word(snapshot.vm_state).to_owned()
    };
    let mark = if snapshot.state == SnapshotState::Creating { "  creating" } else { "" };
    Figures::Snapshot { date: look.date(snapshot.created), memory, disk: size(snapshot.disk_bytes), mark }
}

/// What stands left of a branch: a column of three for each level above, the leftmost given up when there are too many.
#[derive(Debug, Clone, Default)]
struct Indent {
    text: String,
    cut: bool,
}

impl Indent {
    fn branch(&self, last: bool, look: &Look) -> String {
        let branch = match (look.utf8, last) {
            (true, true) => "└─ ",
            (true, false) => "├─ ",
            (false, true) => "`- ",
            (false, false) => "|- ",
        };
        if !self.cut {
            return format!("{}{branch}", self.text);
        }
        let dots = if look.utf8 { "…" } else { "<" };
        format!("{dots}{}{branch}", self.text.chars().skip(1).collect::<String>())
    }

    fn below(&self, last: bool, look: &Look) -> Self {
        let column = match (look.utf8, last) {
            (_, true) => "   ",
            (true, false) => "│  ",
            (false, false) => "|  ",
        };
        let mut next = Self { text: format!("{}{column}", self.text), cut: self.cut };
        if width(&next.text) > DEEPEST {
            next.text = next.text.chars().skip(3).collect();
            next.cut = true;
        }
        next
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// The collector's work in one line, or nothing.
pub(crate) fn pending(pending: &[Pending]) -> Option<String> {
    let of =
        |kind: &str| pending.iter().filter(|p| p.kind == kind).fold((0, 0), |(n, bytes), p| (n + 1, bytes + p.bytes));
    let mut parts = Vec::new();
    for (kind, words) in [("merge", "to merge"), ("remove", "to remove"), ("wait", "waiting")] {
        let (n, bytes) = of(kind);
        if n > 0 {
            parts.push(format!("{} {words} ({})", count(n, "file"), size(bytes)));
        }
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What can be taken back, a line each, or nothing.
pub(crate) fn undo(undo: &[Undo], look: &Look) -> Option<String> {
    let line = |what: &Undo| {
        let figures = format!("{}, until {}", size(what.bytes), look.date(what.until).trim());
        let room = COLUMNS.saturating_sub(16 + width(&figures));
        format!("undo  {}  {} ({figures})\n", short(what.id), look.cut(&plain(&what.what), room))
    };
    (!undo.is_empty()).then(|| undo.iter().map(line).collect())
}

/// One snapshot: what it holds, its configuration, and how that differs from Now's.
pub(crate) fn snapshot(snapshot: &SnapshotView, tree: &TreeView, now: &View, look: &Look) -> String {
    let mut out = format!("{}\n", plain(&snapshot.name));
    let mut say = |key: &str, value: &str| writeln!(out, "  {key:10}{value}").expect("writing to a string never fails");
    say("id", &snapshot.id.to_string());
    say(
        "taken",
        &format!("{} of a machine that was {}", look.date(snapshot.created).trim(), state_word(snapshot.vm_state)),
    );
    let parent = snapshot.parent.and_then(|id| tree.snapshots.iter().find(|s| s.id == id));
    say(
        "stands on",
        &parent.map_or("nothing: it is the first".to_owned(), |p| format!("{} ({})", plain(&p.name), short(p.id))),
    );
    if snapshot.state == SnapshotState::Creating {
        say("state", "creating: its memory is still being written");
    }
    if !snapshot.note.is_empty() {
        say("note", &plain(&snapshot.note));
    }
    say("memory", &memory(snapshot));
    if let Some(took) = pause(snapshot) {
        say("pause", &took);
    }
    for (i, disk) in snapshot.disks.iter().enumerate() {
        let files = count(disk.depth as usize, "file");
        let text =
            format!("{}  {} of {}, {} deep  {}", disk.id, size(disk.bytes), size(disk.size), files, plain(&disk.file));
        say(if i == 0 { "disks" } else { "" }, &text);
    }
    say("machine", &configuration(&snapshot.config));
    let differences = differences(&snapshot.config, &now.config);
    if differences.is_empty() {
        say("Now", "is configured the same");
    }
    for (i, line) in differences.iter().enumerate() {
        say(if i == 0 { "Now" } else { "" }, line);
    }
    out
}

fn memory(snapshot: &SnapshotView) -> String {
    if !snapshot.memory {
        return "none".to_owned();
    }
    let pages = snapshot.pages;
    let bytes = size(snapshot.memory_bytes);
    format!(
        "{bytes} on disk: {} pages stored, {} as in the snapshot before, {} of zeros",
        pages.stored, pages.same, pages.zero
    )
}

fn pause(snapshot: &SnapshotView) -> Option<String> {
    let saved = snapshot.save_ms.map(|ms| format!("the memory was written in {}", duration(ms)));
    let stood = snapshot.pause_ms.map(|ms| format!("the guest stood still for {:.1} ms", f64::from(ms)));
    match (stood, saved) {
        (Some(stood), Some(saved)) => Some(format!("{stood}; {saved}")),
        (stood, saved) => stood.or(saved),
    }
}

fn configuration(config: &Config) -> String {
    let kind = config.machine_type.as_deref().unwrap_or("its machine type is chosen at the first start");
    let firmware = if config.firmware == Firmware::Uefi { ", UEFI" } else { "" };
    format!("{}, {}, {kind}{firmware}", size(config.memory), count(config.cpus as usize, "processor"))
}

/// How Now's configuration differs from a snapshot's, a line each.
fn differences(then: &Config, now: &Config) -> Vec<String> {
    let mut out = Vec::new();
    let mut differ = |what: &str, then: String, now: String| {
        if then != now {
            out.push(format!("{what}: {now} (then {then})"));
        }
    };
    differ("memory", size(then.memory), size(now.memory));
    differ("processors", then.cpus.to_string(), now.cpus.to_string());
    differ("boots from", word(then.boot), word(now.boot));
    differ("CD", then.cdrom.clone().unwrap_or("none".to_owned()), now.cdrom.clone().unwrap_or("none".to_owned()));
    let ports = |config: &Config| {
        let ports: Vec<String> =
            config.net.publish.iter().map(|p| format!("{}:{}:{}", p.address, p.host, p.guest)).collect();
        if ports.is_empty() { "none".to_owned() } else { ports.join(" ") }
    };
    differ("published", ports(then), ports(now));
    let kind = |config: &Config| config.machine_type.clone().unwrap_or("not chosen yet".to_owned());
    differ("machine type", kind(then), kind(now));
    let disk = |config: &Config, id| config.disks.iter().find(|disk| &disk.id == id).map(|disk| disk.size);
    let ids: BTreeSet<_> = then.disks.iter().chain(&now.disks).map(|disk| &disk.id).collect();
    for id in ids {
        let told = |bytes: Option<u64>| bytes.map_or("not there".to_owned(), size);
        differ(&id.to_string(), told(disk(then, id)), told(disk(now, id)));
    }
    out.into_iter().map(|line| plain(&line)).collect()
}

/// A value's own word, as in JSON.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::tests::look;
    use super::*;
    use machine::request::{DiskView, NowView, Pages};
    use machine::tree::{Accel, Boot, DiskId, Net, NetMode, State};
    use uuid::Uuid;

    const MEGA: u64 = 1 << 20;

    fn id(n: u64) -> SnapshotId {
        SnapshotId(Uuid::from_u64_pair(n << 32, 0))
    }

    fn config() -> Config {
        Config {
            memory: 512 * MEGA,
            cpus: 1,
            machine_type: Some("pc-q35-7.2".to_owned()),
            cpu_model: None,
            hpet: false,
            agent: true,
            accel: Accel::Tcg,
            boot: Boot::Disk,
            firmware: Firmware::Bios,
            kernel: None,
            cdrom: None,
            net: Net { mode: NetMode::User, mac: "52:54:00:12:34:56".to_owned(), publish: Vec::new() },
            disks: Vec::new(),
            borrowed: None,
        }
    }

    fn taken(n: u64, name: &str, parent: Option<u64>, created: &str, memory: u64, disk: u64) -> SnapshotView {
        SnapshotView {
            id: id(n),
            name: name.to_owned(),
            note: String::new(),
            parent: parent.map(id),
            created: created.parse().unwrap(),
            state: SnapshotState::Ready,
            vm_state: if memory > 0 { State::Running } else { State::Off },
            memory: memory > 0,
            memory_bytes: memory,
            disk_bytes: disk,
            pause_ms: None,
            save_ms: None,
            pages: Pages::default(),
            disks: Vec::new(),
            config: config(),
        }
    }

    fn forest(parent: Option<u64>, changed: bool, snapshots: Vec<SnapshotView>) -> TreeView {
        TreeView {
            vm: "Tenby".to_owned(),
            now: NowView {
                parent: parent.map(id),
                state: State::Running,
                changed,
                disk_bytes: 12 * MEGA,
                disks: Vec::new(),
            },
            snapshots,
            pending: Vec::new(),
            undo: Vec::new(),
        }
    }

    fn week() -> TreeView {
        let snapshots = vec![
            taken(1, "Monday", None, "2026-11-23T23:40:00Z", 61 * MEGA, 1_288_490_189),
            taken(2, "Tuesday", Some(1), "2026-11-24T23:38:00Z", 18 * MEGA, 140 * MEGA),
            taken(3, "Wednesday", Some(2), "2026-11-25T09:12:00Z", 22 * MEGA, 31 * MEGA),
            taken(4, "Thursday", Some(1), "2026-11-26T23:41:00Z", 19 * MEGA, 88 * MEGA),
        ];
        forest(Some(4), true, snapshots)
    }

    #[test]
    fn the_contracts_example() {
        insta::assert_snapshot!(tree(&week(), &[], &look()), @r"
        Tenby                                     running
        └─ Monday       23 Nov 23:40  mem 61M  disk 1.2G
           ├─ Tuesday   24 Nov 23:38  mem 18M  disk 140M
           │  └─ Wednesday  25 Nov 09:12  mem 22M  disk 31M
           └─ Thursday  26 Nov 23:41  mem 19M  disk 88M
              └─ Now    changed since: 12M
        ");
    }

    #[test]
    fn the_same_without_utf8() {
        let ascii = Look { utf8: false, ..look() };
        let drawing = tree(&week(), &["merging".to_owned()], &ascii);
        assert!(drawing.is_ascii());
        insta::assert_snapshot!(drawing, @r"
        Tenby                                     running, merging
        `- Monday       23 Nov 23:40  mem 61M  disk 1.2G
           |- Tuesday   24 Nov 23:38  mem 18M  disk 140M
           |  `- Wednesday  25 Nov 09:12  mem 22M  disk 31M
           `- Thursday  26 Nov 23:41  mem 19M  disk 88M
              `- Now    changed since: 12M
        ");
    }

    #[test]
    fn a_machine_without_snapshots() {
        insta::assert_snapshot!(tree(&forest(None, true, Vec::new()), &[], &look()), @r"
        Tenby                             running
        └─ Now  disk 12M, no snapshot yet
        ");
    }

    #[test]
    fn several_roots_no_memory_and_one_being_made() {
        let mut making = taken(3, "Sunday", Some(1), "2026-11-22T10:00:00Z", 5 * MEGA, 0);
        making.state = SnapshotState::Creating;
        let snapshots = vec![
            taken(1, "Saturday", None, "2019-11-21T10:00:00Z", 0, 31 * MEGA),
            taken(2, "another beginning", None, "2026-11-22T09:00:00Z", 1100 * MEGA, 4096),
            making,
        ];
        insta::assert_snapshot!(tree(&forest(Some(1), false, snapshots), &[], &look()), @r"
        Tenby                                  running
        ├─ Saturday  21 Nov  2019  off       disk 31M
        │  ├─ Sunday  22 Nov 10:00  mem 5M    disk 0  creating
        │  └─ Now    unchanged since
        └─ another beginning  22 Nov 09:00  mem 1.1G  disk 4K
        ");
    }

    #[test]
    fn nothing_is_wider_than_the_page_however_long_and_deep() {
        let name = "a name of one hundred characters ".repeat(4)[..100].to_owned();
        let snapshots: Vec<SnapshotView> = (1..=40)
            .map(|n| taken(n, &name, (n > 1).then(|| n - 1), "2026-11-22T10:00:00Z", 512 * MEGA, 999 * MEGA))
            .collect();
        let drawing = tree(&forest(Some(40), true, snapshots), &[], &look());
        assert!(drawing.lines().all(|line| width(line) <= COLUMNS), "{drawing}");
        assert_eq!(drawing.lines().count(), 42);
        insta::assert_snapshot!(drawing.lines().skip(8).take(4).collect::<Vec<_>>().join("\n"), @r"
                             └─ a name of one hundre…  22 Nov 10:00  mem 512M  disk 999M
                                └─ a name of one hun…  22 Nov 10:00  mem 512M  disk 999M
        …                       └─ a name of one hun…  22 Nov 10:00  mem 512M  disk 999M
        …                       └─ a name of one hun…  22 Nov 10:00  mem 512M  disk 999M
        ");
    }

    #[test]
    fn a_chain_of_thousands_is_drawn_in_no_time_and_without_a_deep_stack() {
        let snapshots: Vec<SnapshotView> =
            (1..=5000).map(|n| taken(n, "s", (n > 1).then(|| n - 1), "2026-11-22T10:00:00Z", 0, 0)).collect();
        assert_eq!(tree(&forest(Some(5000), true, snapshots), &[], &look()).lines().count(), 5002);
    }

    #[test]
    fn parents_that_are_not_there_and_circles_do_not_hang_it() {
        let circle = vec![
            taken(1, "a", Some(2), "2026-11-22T10:00:00Z", 0, 0),
            taken(2, "b", Some(1), "2026-11-22T10:00:00Z", 0, 0),
            taken(3, "c", Some(99), "2026-11-22T10:00:00Z", 0, 0),
        ];
        assert!(tree(&forest(Some(1), true, circle), &[], &look()).contains("└─ c"));
    }

    #[test]
    fn pending_work_in_a_line() {
        let work = |kind: &str, bytes| Pending {
            kind: kind.to_owned(),
            file: "disks/a.avhdx".to_owned(),
            into: None,
            bytes,
            estimated_ms: None,
            reason: None,
        };
        assert_eq!(pending(&[]), None);
        let told = pending(&[work("merge", 31 * MEGA), work("remove", MEGA), work("remove", MEGA), work("wait", 0)]);
        assert_eq!(told.as_deref(), Some("1 file to merge (31M), 2 files to remove (2M), 1 file waiting (0)"));
    }

    #[test]
    fn what_can_be_taken_back() {
        let row = |n: u64, what: &str| Undo {
            id: machine::tree::TrashId(Uuid::from_u128(u128::from(n) << 96)),
            what: what.to_owned(),
            until: "2026-11-26T15:03:00Z".parse().unwrap(),
            bytes: n * MEGA,
        };
        assert_eq!(undo(&[], &look()), None);
        let rows = [row(31, "deleted Monday, Tuesday and 3 more"), row(4, &format!("deleted {}", "x".repeat(100)))];
        insta::assert_snapshot!(undo(&rows, &look()).unwrap(), @r"
        undo  0000001f  deleted Monday, Tuesday and 3 more (31M, until 26 Nov 15:03)
        undo  00000004  deleted xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx… (4M, until 26 Nov 15:03)
        ");
    }

    #[test]
    fn one_snapshot_and_how_now_differs() {
        let week = week();
        let mut tuesday = week.snapshots[1].clone();
        tuesday.note = "before the update".to_owned();
        tuesday.pause_ms = Some(3.3.into());
        tuesday.save_ms = Some(1900);
        tuesday.pages = Pages { stored: 4608, same: 100_000, zero: 26_464 };
        tuesday.disks = vec![DiskView {
            id: DiskId("disk0".to_owned()),
            file: "disks/0199.avhdx".to_owned(),
            format: "vhdx".to_owned(),
            size: 20 << 30,
            bytes: 140 * MEGA,
            depth: 2,
        }];
        let now = View {
            id: machine::tree::MachineId(Uuid::nil()),
            name: "Tenby".to_owned(),
            note: String::new(),
            state: State::Running,
            doing: Vec::new(),
            alert: None,
            memory: 1 << 30,
            cpus: 2,
            disks: Vec::new(),
            variables: None,
            config: Config { memory: 1 << 30, cpus: 2, ..config() },
            policy: machine::tree::Policy::default(),
            net: config().net,
            sockets: None,
            worker: None,
            qemu: None,
            created: "2026-11-22T10:00:00Z".parse().unwrap(),
            shared: 0,
            isolated: false,
            clock: None,
        };
        insta::assert_snapshot!(snapshot(&tuesday, &week, &now, &look()), @r"
        Tuesday
          id        00000002000000000000000000000000
          taken     24 Nov 23:38 of a machine that was running
          stands on Monday (00000001)
          note      before the update
          memory    18M on disk: 4608 pages stored, 100000 as in the snapshot before, 26464 of zeros
          pause     the guest stood still for 3.3 ms; the memory was written in 1.9 s
          disks     disk0  140M of 20G, 2 files deep  disks/0199.avhdx
          machine   512M, 1 processor, pc-q35-7.2
          Now       memory: 1G (then 512M)
                    processors: 2 (then 1)
        ");
    }
}
