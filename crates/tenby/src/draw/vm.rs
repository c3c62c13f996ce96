//! Machines: the list, one of them, and what a deletion would do.

use super::{Align, Look, Table, count, duration, pending, plain, size, with_doing};
use machine::audit::{Audit, Compared, Finding};
use machine::request::{DeletePlan, TreeView, View};
use machine::rescue::Rescued;
use machine::tree::Clock;
use std::fmt::Write;

/// The state and what is under way beside it.
fn doing(view: &View, look: &Look) -> String {
    with_doing(view.state, &view.doing, look)
}

/// `vm list`: a row each.
pub(crate) fn machines(views: &[View], look: &Look) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[("NAME", Left), ("STATE", Left), ("MEMORY", Right), ("CPUS", Right), ("DISKS", Left)]);
    for view in views {
        let disks: Vec<String> = view.disks.iter().map(|disk| format!("{} {}", disk.id, size(disk.size))).collect();
        table.row([
            look.cut(&plain(&view.name), 32),
            doing(view, look),
            size(view.memory),
            view.cpus.to_string(),
            look.cut(&disks.join(", "), 30),
        ]);
    }
    table.draw()
}

/// `tenby` alone: where each machine stands, and what is still to do.
pub(crate) fn home(machines: &[(View, TreeView)], look: &Look) -> String {
    use Align::Left;
    let mut table = Table::new(&[("NAME", Left), ("STATE", Left), ("NOW", Left), ("PENDING", Left)]);
    for (view, tree) in machines {
        table.row([
            look.cut(&plain(&view.name), 24),
            doing(view, look),
            now(tree, look),
            pending(&tree.pending).unwrap_or_default(),
        ]);
    }
    table.draw()
}

/// Where Now stands, in few words.
fn now(tree: &TreeView, look: &Look) -> String {
    let parent = tree.now.parent.and_then(|id| tree.snapshots.iter().find(|snapshot| snapshot.id == id));
    match parent {
        None => "no snapshot yet".to_owned(),
        Some(parent) if tree.now.changed => {
            format!("{} since {}", size(tree.now.disk_bytes), look.cut(&plain(&parent.name), 20))
        }
        Some(parent) => format!("at {}", look.cut(&plain(&parent.name), 24)),
    }
}

/// `vm show`.
pub(crate) fn machine(view: &View, look: &Look) -> String {
    let mut out = format!("{}  {}\n", plain(&view.name), doing(view, look));
    let mut say = |key: &str, value: &str| writeln!(out, "  {key:10}{value}").expect("writing to a string never fails");
    if let Some(alert) = &view.alert {
        say("mind", &plain(alert));
    }
    say("id", &view.id.to_string());
    say("memory", &format!("{}, {}", size(view.memory), count(view.cpus as usize, "processor")));
    for (i, disk) in view.disks.iter().enumerate() {
        let files = count(disk.depth as usize, "file");
        let bus = view.config.disks.iter().find(|d| d.id == disk.id).map(|d| word(d.bus)).unwrap_or_default();
        say(if i == 0 { "disks" } else { "" }, &format!("{}  {}  {}  {files}", disk.id, size(disk.size), bus));
        say("", &format!("       {} in {}", size(disk.bytes), plain(&disk.file)));
    }
    if view.shared > 0 {
        let detach = format!("tenby vm detach {}", machine::plan::quoted(&view.name));
        say("shared", &format!("{} of its files are other machines', too ({detach} copies them)", size(view.shared)));
    }
    say("network", &network(view));
    if let Some(cdrom) = &view.config.cdrom {
        say("CD", &plain(cdrom));
    }
    say("firmware", &firmware(view));
    let kind = view.config.machine_type.as_deref().unwrap_or("chosen at the first start");
    say("machine", &format!("{kind}, boots from {}, acceleration {}", boots(view), word(view.config.accel)));
    if let Some(behind) = view.clock.as_ref().and_then(|clock| behind(clock, look)) {
        say("clock", &behind);
    }
    say("made", look.date(view.created).trim());
    if view.policy.undo_for > 0 {
        say("undo", &format!("what is deleted or discarded can be taken back for {}", seconds(view.policy.undo_for)));
    }
    if let Some(pid) = view.worker {
        say("worker", &format!("process {pid}{}", view.qemu.map(|pid| format!(", QEMU {pid}")).unwrap_or_default()));
    }
    if let Some(sockets) = &view.sockets {
        say("VNC", &plain(&sockets.vnc));
    }
    if !view.note.is_empty() {
        say("note", &plain(&view.note));
    }
    out
}

/// How far a guest's clock is behind, if that can be seen on it.
fn behind(Clock { behind_ms, since, snapshot }: &Clock, look: &Look) -> Option<String> {
    let applied = |name: &String| format!("{} was applied", look.cut(&plain(name), 30));
    let what = snapshot.as_ref().map_or_else(|| "it went on from its memory".to_owned(), applied);
    let when = look.date(*since);
    let behind = duration(*behind_ms);
    (*behind_ms >= 1000).then(|| {
        format!("the guest's is {behind} behind since {what} ({}), unless it was set or came up anew", when.trim())
    })
}

fn firmware(view: &View) -> String {
    let variables =
        view.variables.as_ref().map(|kept| format!(", variables {} in {}", size(kept.bytes), plain(&kept.file)));
    word(view.config.firmware) + &variables.unwrap_or_default()
}

fn boots(view: &View) -> String {
    if view.config.kernel.is_some() { "its own kernel".to_owned() } else { word(view.config.boot) }
}

fn network(view: &View) -> String {
    let mode = word(view.net.mode);
    let card = (mode != "none").then(|| plain(&view.net.mac));
    if view.isolated {
        let owner = view.config.borrowed.as_ref();
        let mac = owner.map(|owner| plain(&owner.mac)).unwrap_or_default();
        return format!(
            "{mode}, isolated: it goes on from another machine's memory, as {mac}; from its next start on it is {}",
            plain(&view.net.mac)
        );
    }
    let ports =
        view.net.publish.iter().map(|port| format!("{}:{} leads to {}", plain(&port.address), port.host, port.guest));
    std::iter::once(mode).chain(card).chain(ports).collect::<Vec<_>>().join(", ")
}

/// A value's own word, as in JSON.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// `snapshot delete --dry-run`: which snapshots go, each file's fate, how much, how long.
pub(crate) fn plan(plan: &DeletePlan, tree: &TreeView, look: &Look) -> String {
    let mut out = String::new();
    let mut say = |text: String| writeln!(out, "{text}").expect("writing to a string never fails");
    for id in &plan.snapshots {
        let name = tree.snapshots.iter().find(|snapshot| snapshot.id == *id).map_or("?", |snapshot| &snapshot.name);
        say(format!("delete  {} ({})", look.cut(&plain(name), 50), super::short(id)));
    }
    for file in &plan.files {
        let into = file.into.as_deref().map(|into| format!(" into {}", plain(into))).unwrap_or_default();
        let why = file.reason.as_deref().map(|reason| format!(": {}", plain(reason))).unwrap_or_default();
        say(format!("{:6}  {} ({}){into}{why}", plain(&file.kind), plain(&file.file), size(file.bytes)));
    }
    let time = if plan.bytes_moved > 0 { format!(", about {}", duration(plan.estimated_ms)) } else { String::new() };
    say(format!("{} to move, {} become free{time}", size(plan.bytes_moved), size(plan.bytes_freed)));
    if plan.undo_for > 0 {
        say(format!("all that when it cannot be taken back any more: {} later", seconds(plan.undo_for)));
    }
    out
}

/// A setting in the unit that it was given in: `90 minutes`, `1 day`.
pub(super) fn seconds(seconds: u64) -> String {
    let units = [(86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")];
    let (length, unit) = units.into_iter().find(|(length, _)| seconds.is_multiple_of(*length)).unwrap_or((1, "second"));
    count((seconds / length) as usize, unit)
}

/// What came back of a machine, and what could not be known.
pub(crate) fn rescued(rescued: &Rescued, look: &Look) -> String {
    let mut text = super::tree(&rescued.tree, &[], look);
    let mut say = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    if !rescued.unknown.is_empty() {
        say(String::new());
    }
    for said in &rescued.unknown {
        let file = said.file.as_deref().map(|file| format!("{}: ", plain(file))).unwrap_or_default();
        say(format!("- {file}{}", plain(&said.what)));
    }
    if let Some(aside) = &rescued.aside {
        say(format!("- the damaged ledger is kept as {}", plain(aside)));
    }
    text
}

/// What is wrong with a machine's files.
pub(crate) fn audit(name: &str, audit: &Audit) -> String {
    let mut text = String::new();
    for finding in &audit.findings {
        let title = if finding.is_note() { "note" } else { "damage" };
        let Finding { kind, place, what, effect, repair } = finding;
        let [what, place, effect, repair] = [what, place, effect, repair].map(|text| plain(text));
        let lines = format!("{title}: {what} ({kind})\n  where   {place}\n  effect  {effect}\n  repair  {repair}\n");
        text.push_str(&lines);
    }
    if audit.clean {
        let are = if audit.files == 1 { "is" } else { "are" };
        let compared = audit.compared.map(|compared| {
            let Compared { layers, sealed, bytes } = compared;
            format!("; {layers} of {sealed} sealed ones read as recorded ({} read)", size(bytes))
        });
        let line =
            format!("{}: {} {are} sound{}\n", plain(name), count(audit.files, "file"), compared.unwrap_or_default());
        text.push_str(&line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::look;
    use super::*;

    #[test]
    fn how_far_a_clock_is_behind() {
        let since = "2026-11-26T18:30:00Z".parse().expect("a time");
        let told = |behind_ms, snapshot: Option<&str>| {
            behind(&Clock { behind_ms, since, snapshot: snapshot.map(str::to_owned) }, &look())
        };
        assert_eq!(
            told(11_220_000, Some("Monday")).as_deref(),
            Some(
                "the guest's is 3 h 7 min behind since Monday was applied (26 Nov 18:30), unless it was set or came up anew"
            )
        );
        assert_eq!(
            told(1500, None).as_deref(),
            Some(
                "the guest's is 1.5 s behind since it went on from its memory (26 Nov 18:30), unless it was set or came up anew"
            )
        );
        assert_eq!(told(999, None), None);
    }
}
