//! A disk without room: merges wait for some, and a guest that had to stand still goes on when there is some. What could be taken back is
//! given up first, the oldest of it at a time.

use crate::actor::Owner;
use crate::job::Task;
use crate::log;
use crate::reserve;
use crate::tree::State;
use tokio::time::{Duration, Instant};

/// How often it is looked whether there is room.
const LOOK: Duration = Duration::from_secs(2);
/// How often it is looked whether another machine has given up what it shared.
const OTHERS: Duration = Duration::from_secs(60);
/// What fails again within this time was not for want of room.
const JUST_NOW: Duration = Duration::from_secs(10);
/// With less than this the disk is full, bytes: a block of an image and what goes with it, beside what was the reserve a moment ago.
const SCARCE: u64 = reserve::SIZE + (8 << 20);
/// With this a guest goes on, bytes. More than the reserve: when that is given up, it is not the guest's.
const ENOUGH: u64 = 2 * reserve::SIZE;
/// With this there is room for a reserve.
pub(crate) const PLENTY: u64 = 4 * reserve::SIZE;

impl Owner {
    /// When it is to be looked for room again, if anything waits for some, or may have to make some.
    pub(crate) fn due(&self) -> Option<Instant> {
        let starved = self.starved.as_ref().filter(|_| self.folding.is_none() && !self.resting).map(|(_, due)| *due);
        let looks = self.is_off_unsaid() || !self.machine().machine.trash.is_empty();
        let look = looks.then(|| Instant::now() + LOOK);
        // A worker that has nothing else to do does not stay for that: the next one looks.
        let others = (self.shares && self.live.is_some()).then(|| Instant::now() + OTHERS);
        starved.into_iter().chain(self.out_of_room).chain(look).chain(others).min()
    }

    /// Gives up what can be taken back when its time is over, and the oldest of it when the disk is full.
    pub(crate) fn empty_trash(&mut self) {
        if self.machine().machine.trash.is_empty() {
            return;
        }
        let expired = self.machine().machine.expired(jiff::Timestamp::now());
        let given_up = self.keeper.give_up(&expired, "its time is over").and_then(|()| {
            let rows = self.machine();
            match rows.machine.trash_by_time().first() {
                Some(oldest) if self.room() < ENOUGH => self.keeper.give_up(&[oldest.id], "the disk is full"),
                _ => Ok(()),
            }
        });
        if let Err(problem) = given_up {
            log::write(&self.keeper.files, None, &format!("what could be taken back stays for now: {problem}"));
        }
    }

    /// A merge found no room. It begins again at once in what the reserve leaves, or later.
    pub(crate) fn wait_for_room(&mut self, task: &Task) {
        let now = Instant::now();
        let due = if reserve::give_up(&**self.keeper.files.folder()) { now } else { now + LOOK };
        if task.job().is_none_or(|job| job.reason.is_none()) {
            log::write(&self.keeper.files, Some(task.id()), "the disk is full: the merge waits for room");
        }
        task.waiting("space");
        self.starved = Some((task.clone(), due));
    }

    /// Makes the reserve if there is plenty of room, while other things go on.
    pub(crate) fn keep_reserve(&mut self) {
        let under_way = self.reserving.as_ref().is_some_and(|making| !making.is_finished());
        if !under_way && self.room() >= PLENTY {
            let folder = std::sync::Arc::clone(self.keeper.files.folder());
            // If it fails: another time, then.
            self.reserving = Some(tokio::task::spawn_blocking(move || drop(reserve::keep(&*folder))));
        }
    }

    /// The guest stands still because a disk could not be read or written. Why, and what becomes of it: if it was for want of room, it goes on by
    /// itself. There may be room again by now, or it was another worker that knew: so anything else is tried once more, too.
    pub(crate) fn note_failed_disk(&mut self) -> &'static str {
        let now = Instant::now();
        if self.room() < SCARCE {
            self.out_of_room = Some(now + LOOK);
            return "the host's disk is full; the guest stands still until there is room";
        }
        let tried = self.tried_again.replace(now).is_some_and(|tried| tried + JUST_NOW > now);
        self.out_of_room = (!tried).then_some(now);
        match tried {
            true => "a disk could not be read or written; the guest stands still until it is resumed",
            false => "a disk could not be read or written; it is tried once more",
        }
    }

    /// Lets a guest go on that stands still for want of room, if there is some.
    pub(crate) async fn look_for_room(&mut self) {
        let now = Instant::now();
        if self.out_of_room.is_none_or(|due| due > now) {
            return;
        }
        if self.room() < ENOUGH {
            self.out_of_room = Some(now + LOOK);
            return;
        }
        self.out_of_room = None;
        log::write(&self.keeper.files, None, "there is room: the guest goes on");
        let committed = self.keeper.book.commit(|rows| rows.machine.now.state = State::Running);
        let gone_on = match committed {
            Ok(()) => self.let_run().await,
            failed => failed,
        };
        self.shared.set_moment(|moment| moment.alert = gone_on.err().map(|problem| problem.message));
    }

    /// Bytes that are free where the machine's files lie.
    fn room(&self) -> u64 {
        self.keeper.files.folder().room().unwrap_or(0)
    }
}
