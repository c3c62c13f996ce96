//! `tenby snapshot`

use super::clone::{self, Origin};
use super::vm::{carry_out_on, quoted};
use super::{Waiting, words};
use crate::out::{ask, interactive};
use crate::session::{Session, cancelled, problem};
use crate::{draw, follow};
use clap::{Args, Subcommand};
use machine::request::{Present, Problem, ProblemKind, Request, SnapshotView, TreeView};
use machine::root::Found;

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Take a snapshot: disks, memory if there is any, and the configuration
    #[command(
        after_help = "Examples:\n  tenby snapshot create web\n  tenby snapshot create web \"before the update\" --note \"1.4 runs\""
    )]
    Create {
        #[command(flatten)]
        vm: Vm,
        /// Its name [default: "VM - (DATE - TIME)"]
        #[arg(value_parser = words::new_name)]
        name: Option<String>,
        /// Words of yours
        #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
        note: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Draw the tree of snapshots, with Now
    #[command(after_help = "Example:\n  tenby snapshot list web")]
    List(Vm),
    /// Show what a snapshot holds, its configuration, and how that differs from Now's
    #[command(after_help = "Example:\n  tenby snapshot show web Monday")]
    Show {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        snapshot: Snapshot,
    },
    /// Make a snapshot the present
    ///
    /// Without --keep, --keep-as or --discard it asks on a terminal, and is refused elsewhere, unless nothing would be lost.
    /// With VM@SNAP it is another machine's snapshot, onto a machine that has none of its own: that shares the other's files from then on.
    #[command(after_help = "Examples:
  tenby snapshot apply web Monday --keep
  tenby snapshot apply web Monday --discard --no-start
  tenby snapshot apply test web@Monday --discard")]
    Apply {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        snapshot: Snapshot,
        #[command(flatten)]
        how: ApplyArgs,
    },
    /// Apply the snapshot that Now stands on
    #[command(after_help = "Example:\n  tenby snapshot revert web --discard")]
    Revert {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        how: ApplyArgs,
    },
    /// Delete a snapshot; its files are removed or merged in the background
    #[command(
        after_help = "Examples:\n  tenby snapshot delete web Monday --dry-run\n  tenby snapshot delete web Monday --subtree --wait"
    )]
    Delete {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        snapshot: Snapshot,
        /// And everything below it
        #[arg(long)]
        subtree: bool,
        /// Only say which files would go, which merge, how many bytes, how long
        #[arg(long)]
        dry_run: bool,
        /// Wait for the merging, too
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Rename a snapshot
    #[command(after_help = "Example:\n  tenby snapshot rename web Monday \"The first\"")]
    Rename {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        snapshot: Snapshot,
        /// The new name
        #[arg(value_parser = words::new_name)]
        new: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Note something on a snapshot
    #[command(after_help = "Example:\n  tenby snapshot note web Monday \"the last with 1.4\"")]
    Note {
        #[command(flatten)]
        vm: Vm,
        #[command(flatten)]
        snapshot: Snapshot,
        /// Words of yours
        text: String,
        #[command(flatten)]
        waiting: Waiting,
    },
}

/// A machine that is there.
#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// The machine: its name, its id, or how its id begins
    #[arg(value_name = "VM", value_parser = words::name)]
    vm: String,
}

/// A snapshot that is there.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The snapshot: its name, its id, or how its id begins
    #[arg(value_name = "SNAP", value_parser = words::name)]
    snapshot: String,
}

/// What becomes of the present, and whether the machine runs afterwards.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that a person types")]
pub(crate) struct ApplyArgs {
    /// Keep the present as a snapshot of its own
    #[arg(long, conflicts_with_all = ["keep_as", "discard"])]
    keep: bool,
    /// Keep the present as a snapshot of this name
    #[arg(long, value_name = "NAME", value_parser = words::new_name, conflicts_with = "discard")]
    keep_as: Option<String>,
    /// Give the present up
    #[arg(long)]
    discard: bool,
    /// Run it afterwards [default: if it was running just before]
    #[arg(long, conflicts_with = "no_start")]
    start: bool,
    /// Do not run it afterwards
    #[arg(long)]
    no_start: bool,
    /// Leave the snapshot's memory out: the disks as after a power cut
    #[arg(long)]
    no_memory: bool,
    #[command(flatten)]
    waiting: Waiting,
}

impl ApplyArgs {
    fn present(&self) -> Present {
        match (&self.keep_as, self.keep, self.discard) {
            (Some(name), ..) => Present::Keep { name: Some(name.clone()) },
            (None, true, _) => Present::Keep { name: None },
            (None, _, true) => Present::Discard,
            _ => Present::IfUnchanged,
        }
    }

    fn start(&self) -> Option<bool> {
        if self.start { Some(true) } else { self.no_start.then_some(false) }
    }
}

impl Verb {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Problem> {
        match self {
            Self::Create { vm, name, note, waiting } => {
                carry_out_on(session, &session.find(&vm.vm)?, Request::Snapshot { name, note }, waiting).await
            }
            Self::List(vm) => list(session, &vm).await,
            Self::Show { vm, snapshot } => show(session, &vm, &snapshot.snapshot).await,
            Self::Apply { vm, snapshot, how } => {
                if snapshot.snapshot.contains('@') {
                    return apply_other(session, &vm, &snapshot.snapshot, &how).await;
                }
                let (start, memory) = (how.start(), !how.no_memory);
                let request = |present| Request::Apply { snapshot: snapshot.snapshot.clone(), present, start, memory };
                apply(session, &vm, &how, request).await
            }
            Self::Revert { vm, how } => {
                let (start, memory) = (how.start(), !how.no_memory);
                apply(session, &vm, &how, |present| Request::Revert { present, start, memory }).await
            }
            Self::Delete { vm, snapshot, dry_run: true, subtree, .. } => {
                plan(session, &vm, &snapshot.snapshot, subtree).await
            }
            Self::Delete { vm, snapshot, subtree, wait, waiting, .. } => {
                let request = Request::Delete { snapshot: snapshot.snapshot, subtree, wait };
                carry_out_on(session, &session.find(&vm.vm)?, request, waiting).await
            }
            Self::Rename { vm, snapshot, new, waiting } => {
                let request = Request::RenameSnapshot { snapshot: snapshot.snapshot, name: new };
                carry_out_on(session, &session.find(&vm.vm)?, request, waiting).await
            }
            Self::Note { vm, snapshot, text, waiting } => {
                let request = Request::NoteSnapshot { snapshot: snapshot.snapshot, note: text };
                carry_out_on(session, &session.find(&vm.vm)?, request, waiting).await
            }
        }
    }
}

async fn list(session: &Session, vm: &Vm) -> Result<(), Problem> {
    let reader = session.sure_reader(&session.find(&vm.vm)?).await?;
    let (tree, view) = (reader.tree().await?, reader.view().await?);
    session.out.show(&tree, |look| {
        let pending = draw::pending(&tree.pending).map(|work| format!("\n{work}\n")).unwrap_or_default();
        let undo = draw::undo(&tree.undo, look).map(|undo| format!("\n{undo}")).unwrap_or_default();
        format!("{}{pending}{undo}", draw::tree(&tree, &view.doing, look))
    });
    Ok(())
}

async fn show(session: &Session, vm: &Vm, name: &str) -> Result<(), Problem> {
    let reader = session.sure_reader(&session.find(&vm.vm)?).await?;
    let (tree, view) = (reader.tree().await?, reader.view().await?);
    let snapshot = find(&tree, name)?;
    session.out.show(snapshot, |look| draw::snapshot(snapshot, &tree, &view, look));
    Ok(())
}

/// The snapshot of this name, id, or beginning of an id. (Requests are resolved by the worker; this is for looking only.)
fn find<'a>(tree: &'a TreeView, name: &str) -> Result<&'a SnapshotView, Problem> {
    let named: Vec<_> = tree.snapshots.iter().filter(|snapshot| snapshot.name == name).collect();
    let lower = name.to_ascii_lowercase();
    let by_id = || {
        tree.snapshots
            .iter()
            .filter(|snapshot| !name.is_empty() && snapshot.id.to_string().starts_with(&lower))
            .collect()
    };
    let matches = if named.is_empty() { by_id() } else { named };
    match matches.as_slice() {
        [one] => Ok(one),
        [] => Err(Problem::not_found(format!("{} has no snapshot \"{name}\"", tree.vm))
            .hint(format!("tenby snapshot list {}", quoted(&tree.vm)))),
        several => {
            let mut problem = Problem::new(
                ProblemKind::Ambiguous,
                format!("\"{name}\" may be {} of {}", draw::count(several.len(), "snapshot"), tree.vm),
            );
            problem.candidates = several
                .iter()
                .map(|snapshot| format!("{}  {} ({})", draw::short(snapshot.id), snapshot.name, snapshot.created))
                .collect();
            Err(problem.hint(format!("tenby snapshot show {} {}", quoted(&tree.vm), draw::short(several[0].id))))
        }
    }
}

/// Applies; where something would be lost and nothing was said about it, a person at a terminal is asked.
async fn apply(
    session: &Session,
    vm: &Vm,
    how: &ApplyArgs,
    request: impl Fn(Present) -> Request,
) -> Result<(), Problem> {
    let found = session.find(&vm.vm)?;
    let present = how.present();
    let asks = present == Present::IfUnchanged && interactive() && !how.waiting.at_once;
    match carry_out_on(session, &found, request(present), how.waiting).await {
        Err(refusal) if asks && would_lose(&refusal) => {
            let present = keep_or_discard(&found, &refusal)?;
            let job = follow::ask(session, &found, request(present)).await?;
            super::job::told(session, &job)
        }
        result => result,
    }
}

/// Another machine's snapshot, onto one that has none of its own.
async fn apply_other(session: &Session, vm: &Vm, origin: &str, how: &ApplyArgs) -> Result<(), Problem> {
    let origin: Origin = origin.parse().map_err(Problem::usage)?;
    let found = session.find(&vm.vm)?;
    let (present, memory) = (how.present(), !how.no_memory);
    if let Some(own) = clone::own_snapshot(session, &found, &origin)? {
        let request = |present| Request::Apply { snapshot: own.clone(), present, start: how.start(), memory };
        return apply(session, vm, how, request).await;
    }
    if how.waiting.at_once && how.start {
        return Err(Problem::usage("--async and --start do not go together here: it is started when it is there"));
    }
    let asks = present == Present::IfUnchanged && interactive() && !how.waiting.at_once;
    match clone::apply(session, &found, &origin, memory, present, how.waiting).await {
        Err(refusal) if asks && would_lose(&refusal) => {
            let present = keep_or_discard(&found, &refusal)?;
            clone::apply(session, &found, &origin, memory, present, how.waiting).await
        }
        result => result,
    }?;
    if how.start {
        carry_out_on(session, &found, Request::Start { paused: false }, how.waiting).await?;
    }
    Ok(())
}

/// Whether a refusal is the one that `--keep` and `--discard` answer: its hint says so.
fn would_lose(refusal: &Problem) -> bool {
    refusal.kind == ProblemKind::Refused && refusal.hint.as_deref().is_some_and(|hint| hint.contains("--keep"))
}

fn keep_or_discard(found: &Found, refusal: &Problem) -> Result<Present, Problem> {
    let question =
        format!("{}.\nKeep the present as a snapshot, discard it, or cancel? [k/d/C] ", draw::plain(&refusal.message));
    match ask(&question).unwrap_or_default().to_lowercase().as_str() {
        "k" | "keep" => Ok(Present::Keep { name: None }),
        "d" | "discard" => Ok(Present::Discard),
        _ => Err(cancelled(format!("{} stays as it is", found.name))),
    }
}

async fn plan(session: &Session, vm: &Vm, name: &str, subtree: bool) -> Result<(), Problem> {
    let found = session.find(&vm.vm)?;
    let client = session.worker(&found).await?;
    let plan = client.plan_delete(found.id, name, subtree).await.map_err(problem)?;
    let tree = client.tree(found.id).await.map_err(problem)?;
    session.out.show(&plan, |look| draw::plan(&plan, &tree, look));
    Ok(())
}
