//! Which request may start in which state. Pure, and total: every pair has an answer.
//!
//! | request | off | running | paused | saved |
//! | --- | --- | --- | --- | --- |
//! | start | boots | *already* | refused: resume | resumes its memory |
//! | stop | *already* | asks the guest | refused: resume, or turn off | refused: start, or turn off |
//! | stop --turn-off | *already* | turned off | turned off | memory dropped |
//! | save | refused: start | saved | saved | *already* |
//! | pause | refused: start | halted | *already* | refused: start |
//! | resume | refused: start | *already* | goes on | refused: start |
//! | restart | refused: start | reset | refused: resume | refused: start |
//! | snapshot, apply, revert, delete, undo, rename, note | yes | yes | yes | yes |
//! | clone, lend, detach | yes | yes | yes | yes |
//! | take over another's snapshot | yes | refused: turn off | refused: turn off | yes |
//! | undo of a removed disk | yes | refused: stop | refused: turn off | refused: turn off |
//! | set of hardware | yes; a disk whose files are still to be merged does not grow | refused: stop | refused: turn off | refused: turn off |
//! | delete the machine | yes | refused: turn off | refused: turn off | yes |
//!
//! # While another one is under way
//!
//! Requests are carried out one after the other, whoever asks; nobody ever has to unlock anything. What a second one gets is the answer of the
//! table above in the state that the first one leads to. (`starting`, `saving` and `stopping` are states of a request that is under way, so
//! none is admitted in them.)
//!
//! | under way | every request of the table | stop --turn-off | look, screenshot, console, cancel |
//! | --- | --- | --- | --- |
//! | any of the table | queued | queued | at once |
//! | stop, waiting for the guest | queued | cuts it short: what waits is cancelled, the guest turned off | at once |
//! | snapshot, save, apply: memory is written | queued; a snapshot that is not `ready` is neither applied nor deleted | queued | at once; cancelled, nothing has changed |
//! | merge | stops it; it begins again afterwards, at its pace | the same | at once; cancelled, it rests until the tree changes |
//! | merge that waits for room, or is paused | carried out at once | the same | at once |
//!
//! Two clients that delete the same snapshot: the second is told that there is none of that name. Every pair is tried in `e2e/tests/pairs.rs`.

use crate::plan::quoted;
use crate::request::{Problem, Request, Settings};
use crate::tree::State;

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// It is carried out.
    Go,
    /// Its end is reached already; these words say so.
    Already(String),
}

/// Whether `request` may start while the machine called `name` is in `state`.
pub fn admit(request: &Request, state: State, name: &str) -> Result<Admission, Problem> {
    use State::{Off, Paused, Running, Saved};
    let shell = quoted(name);
    let already = |what: &str| Ok(Admission::Already(format!("{name} is {what} already")));
    let refuse = |why: &str, hint: String| Err(Problem::refused(format!("{name} {why}")).hint(hint));
    let start = || format!("tenby vm start {shell}");
    let resume = || format!("tenby vm resume {shell}");
    let turn_off = || format!("tenby vm stop {shell} --turn-off");
    match (request, state) {
        (Request::Start { .. }, Running) => already("running"),
        (Request::Start { .. }, Paused) => refuse("is paused, not off", resume()),
        (Request::Stop { .. }, Off) => already("off"),
        (Request::Stop { turn_off: false, .. }, Paused) => refuse(
            "is paused: its guest cannot be asked to shut down",
            format!("{}      (or {})", resume(), turn_off()),
        ),
        (Request::Stop { turn_off: false, .. }, Saved) => {
            refuse("is saved: turning it off would drop its memory", format!("{}      (or {})", start(), turn_off()))
        }
        (Request::Save, Saved) => already("saved"),
        (Request::Save, Off) => refuse("is off: there is no memory to save", start()),
        (Request::Pause, Paused) => already("paused"),
        (Request::Pause, Off) => refuse("is off", start()),
        (Request::Pause, Saved) => refuse("is saved", format!("{} --paused", start())),
        (Request::Resume, Running) => already("running"),
        (Request::Resume | Request::Restart, Off) => refuse("is off", start()),
        (Request::Resume | Request::Restart, Saved) => refuse("is saved", start()),
        (Request::Restart, Paused) => refuse("is paused", resume()),
        (Request::Set(settings), Running | Paused | Saved) if settings.hardware() => {
            let stop = if state == Running { format!("tenby vm stop {shell}") } else { turn_off() };
            refuse(&format!("is {}: its hardware can change only while it is off", word(state)), stop)
        }
        (Request::TakeOver { .. }, Running | Paused) => {
            let why = format!("is {}: another machine's snapshot is applied to one that is off or saved", word(state));
            refuse(&why, turn_off())
        }
        (Request::DeleteMachine { .. }, Running | Paused) => refuse(&format!("is {}", word(state)), turn_off()),
        (_, State::Starting | State::Saving | State::Stopping) => {
            refuse(&format!("is {}; ask again when that has ended", word(state)), format!("tenby job list {shell}"))
        }
        _ => Ok(Admission::Go),
    }
}

/// A state in the contract's word.
pub fn word(state: State) -> &'static str {
    match state {
        State::Off => "off",
        State::Starting => "starting",
        State::Running => "running",
        State::Paused => "paused",
        State::Saving => "saving",
        State::Saved => "saved",
        State::Stopping => "stopping",
    }
}

impl Settings {
    /// Whether it changes what the guest sees.
    pub fn hardware(&self) -> bool {
        self.memory.is_some()
            || self.cpus.is_some()
            || !self.add_disks.is_empty()
            || !self.remove_disks.is_empty()
            || !self.grow_disks.is_empty()
            || self.cdrom.is_some()
            || self.boot.is_some()
            || self.publish.is_some()
    }
}

impl Request {
    /// Whether its user has said by it whether the guest is to run.
    pub(crate) fn says_whether_it_runs(&self) -> bool {
        match self {
            Self::Start { .. }
            | Self::Stop { .. }
            | Self::Save
            | Self::Pause
            | Self::Resume
            | Self::Restart
            | Self::Apply { .. }
            | Self::Revert { .. }
            | Self::TakeOver { .. }
            | Self::DeleteMachine { .. } => true,
            Self::Snapshot { .. }
            | Self::Delete { .. }
            | Self::Undo { .. }
            | Self::RenameSnapshot { .. }
            | Self::NoteSnapshot { .. }
            | Self::Rename { .. }
            | Self::Clone { .. }
            | Self::Lend { .. }
            | Self::Detach
            | Self::Set(_) => false,
        }
    }

    /// The kind of its job.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::Stop { .. } => "stop",
            Self::Save => "save",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Restart => "restart",
            Self::Snapshot { .. } => "snapshot",
            Self::Apply { .. } | Self::Revert { .. } => "apply",
            Self::Delete { .. } => "delete",
            Self::Undo { .. } => "undo",
            Self::RenameSnapshot { .. } | Self::Rename { .. } => "rename",
            Self::NoteSnapshot { .. } => "note",
            Self::Set(_) => "set",
            Self::Clone { .. } => "clone",
            Self::Lend { .. } => "lend",
            Self::TakeOver { .. } => "apply",
            Self::Detach => "detach",
            Self::DeleteMachine { .. } => "delete-machine",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_the_answer_of_the_table() {
        use State::{Off, Paused, Running, Saved};
        let stop = |turn_off| Request::Stop { timeout_ms: 1, turn_off };
        let hardware = || Request::Set(Box::new(Settings { cpus: Some(2), ..Settings::default() }));
        // g: carried out, a: already so, r: refused; in the order off, running, paused, saved.
        let table = [
            (Request::Start { paused: false }, "garg"),
            (stop(false), "agrr"),
            (stop(true), "aggg"),
            (Request::Save, "rgga"),
            (Request::Pause, "rgar"),
            (Request::Resume, "ragr"),
            (Request::Restart, "rgrr"),
            (Request::Snapshot { name: None, note: String::new() }, "gggg"),
            (Request::Delete { snapshot: "x".into(), subtree: false, wait: false }, "gggg"),
            (Request::Undo { id: None }, "gggg"),
            (hardware(), "grrr"),
            (Request::Set(Box::default()), "gggg"),
            (Request::Clone { snapshot: "x".into(), names: vec!["y".into()], note: String::new() }, "gggg"),
            (Request::Lend { snapshot: "x".into(), memory: true }, "gggg"),
            (
                Request::TakeOver {
                    lent: crate::tree::MachineId::new(),
                    origin: "x@y".into(),
                    present: crate::request::Present::Discard,
                },
                "grrg",
            ),
            (Request::Detach, "gggg"),
            (Request::DeleteMachine { discard: false }, "grrg"),
        ];
        for (request, answers) in table {
            for (state, answer) in [Off, Running, Paused, Saved].into_iter().zip(answers.chars()) {
                let found = match admit(&request, state, "lab") {
                    Ok(Admission::Go) => 'g',
                    Ok(Admission::Already(_)) => 'a',
                    Err(problem) => {
                        assert!(problem.hint.is_some(), "{request:?} in {state:?} says what to type");
                        'r'
                    }
                };
                assert_eq!(found, answer, "{request:?} in {state:?}");
            }
        }
    }
}
