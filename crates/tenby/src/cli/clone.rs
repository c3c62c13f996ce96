//! `tenby vm create NEW --from VM@SNAP`, and `tenby snapshot apply NEW VM@SNAP`: machines from another one's snapshot.

use super::vm::{carry_out_on, quoted};
use super::{Waiting, job};
use crate::session::{Session, cancelled};
use crate::work::{Wish, Wishes};
use crate::{draw, follow, json};
use machine::linked::copied;
use machine::request::{Job, Present, Problem, ProblemKind, Request, View};
use machine::root::Found;
use machine::tree::{Machine, MachineId, Snapshot};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use tokio::task::JoinSet;

/// How many machines are made at a time.
pub(crate) const MOST: u32 = machine::ops::clone::MOST as u32;

/// A snapshot of a machine, as one word: `VM@SNAP`.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    vm: String,
    snapshot: String,
}

impl std::str::FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('@') {
            Some((vm, snapshot)) if !vm.is_empty() && !snapshot.is_empty() => {
                Ok(Self { vm: vm.to_owned(), snapshot: snapshot.to_owned() })
            }
            _ => Err("a machine and one of its snapshots, with @ between them: web@fresh".to_owned()),
        }
    }
}

/// The machine and its snapshot, as they are now. Nobody is woken.
struct Source {
    found: Found,
    machine: Machine,
    snapshot: Snapshot,
}

impl Source {
    async fn find(session: &Session, origin: &Origin) -> Result<Self, Problem> {
        let found = session.find(&origin.vm)?;
        let machine = session.reader(&found).await?.machine().await?;
        let snapshot = machine.snapshots[&machine.resolve(&origin.snapshot)?].clone();
        Ok(Self { found, machine, snapshot })
    }

    /// By its id: a name that is given to another meanwhile does not lead astray.
    fn snapshot_id(&self) -> String {
        self.snapshot.id.to_string()
    }

    fn name(&self) -> String {
        format!("{}@{}", self.machine.name, self.snapshot.name)
    }

    /// Says what cannot be shared, before it is copied.
    fn tell_copies(&self, session: &Session, memory: bool, machines: usize) {
        let each = if machines == 1 { String::new() } else { ", for each machine".to_owned() };
        for row in copied(&self.machine, &self.snapshot, memory) {
            let bytes = std::fs::metadata(&row.file).map_or(0, |about| about.blocks() * 512);
            let line = format!("{} was taken in place: its {} are copied{each}", row.file, draw::size(bytes));
            session.out.note(&line);
        }
        let device = |path: PathBuf| std::fs::metadata(path).map(|about| about.dev()).ok();
        let own = session.root.machine_folder(self.machine.id).join("disks");
        if device(own) != device(session.root.path().to_owned()) {
            let line = format!("{} lies on a file system of its own: its files are copied{each}", self.machine.name);
            session.out.note(&line);
        }
    }
}

/// What is to be made.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) name: String,
    pub(crate) count: Option<u32>,
    pub(crate) start: bool,
    pub(crate) note: String,
}

/// `vm create NEW --from VM@SNAP`
pub(crate) async fn create(session: &Session, origin: &Origin, new: New) -> Result<(), Problem> {
    let names: Vec<String> = match new.count {
        None => vec![new.name],
        Some(count) => (1..=count).map(|n| format!("{}-{n}", new.name)).collect(),
    };
    let source = Source::find(session, origin).await?;
    if new.start {
        check_ram(names.len(), source.snapshot.config.memory)?;
    }
    source.tell_copies(session, true, names.len());
    let request = Request::Clone { snapshot: source.snapshot_id(), names: names.clone(), note: new.note };
    let mut wishes = Wishes::hear()?;
    let job = follow::ask(session, &source.found, request).await?;
    let made = made(&job)?;
    if new.start {
        start(session, &made, &mut wishes).await?;
    }
    if session.out.json() {
        return tell(session, &made, new.count.is_some()).await;
    }
    let said = crate::draw::done(&job, jiff::Timestamp::now());
    let then = match (new.start, made.as_slice()) {
        (true, [_]) => "; it runs".to_owned(),
        (true, _) => "; they run".to_owned(),
        (false, [one]) => format!("; `tenby vm start {}` starts it", quoted(&one.name)),
        (false, _) => String::new(),
    };
    session.out.done(&format!("{said}{then}"));
    Ok(())
}

/// Starts machines that were made a moment ago. That one of them cannot be started keeps none of the others from it.
async fn start(session: &Session, machines: &[Found], wishes: &mut Wishes) -> Result<(), Problem> {
    let outcomes = match machines {
        // That they are made came before the wish to cancel that was heard.
        _ if wishes.came() => machines.iter().map(|_| None).collect(),
        [one] => vec![Some(start_one(session, one).await)],
        several => start_side_by_side(session, several, wishes).await?,
    };
    let outcomes: Vec<(&str, Outcome)> = machines.iter().map(|machine| machine.name.as_str()).zip(outcomes).collect();
    match outcomes.iter().find(|(_, outcome)| !matches!(outcome, Some(Ok(())))) {
        None => Ok(()),
        Some((name, outcome)) => Err(not_started(session, &outcomes, name, outcome)),
    }
}

/// What became of machines that were to be started, of which `first` is the first that was not.
fn not_started(session: &Session, outcomes: &[(&str, Outcome)], first: &str, why: &Outcome) -> Problem {
    let missing: Vec<_> = outcomes.iter().filter(|(_, outcome)| !matches!(outcome, Some(Ok(())))).collect();
    let problem = |outcome: &Outcome| match outcome {
        Some(Err(problem)) => problem.clone(),
        _ => cancelled("cancelled before that was begun"),
    };
    let first_problem = problem(why);
    let message = match outcomes {
        [(name, _)] => format!("{name} is made, but not started: {}", first_problem.message),
        all => {
            for (name, outcome) in &missing {
                session.out.note(&format!("{name} was not started: {}", problem(outcome)));
            }
            let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
            let (all, started) = (all.len(), all.len() - missing.len());
            format!("started {started} of {all} machines, but not {}: {}", few(&names), first_problem.message)
        }
    };
    let start = format!("tenby vm start {}", quoted(first));
    Problem::new(first_problem.kind, message).hint(first_problem.hint.unwrap_or(start))
}

async fn start_one(session: &Session, machine: &Found) -> Result<(), Problem> {
    follow::ask(session, machine, Request::Start { paused: false }).await.map(drop)
}

/// What came of starting a machine; nothing, if that was not begun.
type Outcome = Option<Result<(), Problem>>;

/// Starts machines, as many side by side as there are processors. Once its user has cancelled one, no more are begun.
async fn start_side_by_side(
    session: &Session,
    machines: &[Found],
    wishes: &mut Wishes,
) -> Result<Vec<Outcome>, Problem> {
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    let (quiet, progress) = (session.quietly(), session.out.progress());
    let mut outcomes: Vec<Outcome> = machines.iter().map(|_| None).collect();
    let mut waiting = machines.iter().cloned().enumerate();
    let (mut under_way, mut ended, mut cancelled) = (JoinSet::new(), 0, false);
    loop {
        while under_way.len() < most && !cancelled {
            let Some((nth, machine)) = waiting.next() else { break };
            let session = quiet.clone();
            under_way.spawn(async move { (nth, start_one(&session, &machine).await) });
        }
        progress.say(&format!("started {ended} of {}", machines.len()));
        let joined = tokio::select! {
            joined = under_way.join_next() => joined,
            // Those that are under way hear it, too.
            wish = wishes.next(), if !cancelled => {
                cancelled = true;
                if wish == Wish::Cancel {
                    session.out.note("cancelling; once more leaves it running");
                }
                continue;
            }
        };
        let Some(joined) = joined else { return Ok(outcomes) };
        let (nth, outcome) = joined.map_err(|error| Problem::failed(format!("starting broke off: {error}")))?;
        cancelled |= outcome.as_ref().is_err_and(|problem| problem.kind == ProblemKind::Cancelled);
        ended += 1;
        outcomes[nth] = Some(outcome);
    }
}

/// `web-1, web-2, web-3 and 7 more`.
fn few(names: &[&str]) -> String {
    const FEW: usize = 3;
    let more = names.len().saturating_sub(FEW);
    let named = names[..names.len() - more].join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// The machines that a job has made.
fn made(job: &Job) -> Result<Vec<Found>, Problem> {
    #[derive(serde::Deserialize)]
    struct Made {
        machines: Vec<machine::linked::Named>,
    }
    if let Some(error) = &job.error {
        return Err(error.clone());
    }
    let result = job.result.clone().unwrap_or_default();
    let made: Made = serde_json::from_value(result)
        .map_err(|error| Problem::failed(format!("what was made is not said: {error}")).hint("tenby vm list"))?;
    Ok(made.machines.into_iter().map(|new| Found { id: new.id, name: new.name }).collect())
}

async fn tell(session: &Session, made: &[Found], many: bool) -> Result<(), Problem> {
    let mut vms: Vec<View> = Vec::new();
    for found in made {
        vms.push(session.reader(found).await?.view().await?);
    }
    match vms.as_slice() {
        [one] if !many => session.out.document(one),
        vms => session.out.document(&json::Machines { vms }),
    }
    Ok(())
}

/// Refuses to begin what this host has not the RAM for.
fn check_ram(machines: usize, each: u64) -> Result<(), Problem> {
    let (Some(free), needed) = (qemu::available_ram(), each.saturating_mul(machines as u64)) else {
        return Ok(());
    };
    if needed <= free {
        return Ok(());
    }
    let what = match machines {
        1 => format!("it needs {} of RAM", draw::size(each)),
        _ => format!("{machines} machines of {} need {} of RAM", draw::size(each), draw::size(needed)),
    };
    Err(Problem::refused(format!("{what}, and {} are free on this host; nothing was made", draw::size(free)))
        .hint("the same without --start, or with fewer machines"))
}

/// `snapshot apply NEW VM@SNAP`. `present` is what becomes of NEW's.
pub(crate) async fn apply(
    session: &Session,
    found: &Found,
    origin: &Origin,
    memory: bool,
    present: Present,
    waiting: Waiting,
) -> Result<(), Problem> {
    let source = Source::find(session, origin).await?;
    check_can_take_over(session, found).await?;
    source.tell_copies(session, memory, 1);
    let lend = Request::Lend { snapshot: source.snapshot_id(), memory };
    let job = follow::ask(session, &source.found, lend).await?;
    let lent = lent(&job)?;
    let taken_over =
        carry_out_on(session, found, Request::TakeOver { lent, origin: source.name(), present }, waiting).await;
    if !waiting.at_once {
        // A worker that died has left it.
        session.root.clear_away(lent);
    }
    taken_over
}

/// Whether VM@SNAP is a snapshot of this very machine; its name then.
pub(crate) fn own_snapshot(session: &Session, found: &Found, origin: &Origin) -> Result<Option<String>, Problem> {
    Ok((session.find(&origin.vm)?.id == found.id).then(|| origin.snapshot.clone()))
}

/// What its worker would refuse is not made ready first.
async fn check_can_take_over(session: &Session, found: &Found) -> Result<(), Problem> {
    let machine = session.reader(found).await?.machine().await?;
    machine.check_can_take_over()?;
    let request = Request::TakeOver { lent: found.id, origin: String::new(), present: Present::IfUnchanged };
    machine::admit::admit(&request, machine.now.state, &machine.name).map(drop)
}

fn lent(job: &Job) -> Result<MachineId, Problem> {
    let told = job::ended_well(job)?.result.as_ref().and_then(|result| result.get("lent")?.as_str()?.parse().ok());
    told.map(MachineId).ok_or_else(|| Problem::failed("what was made ready is not said"))
}
